"""Scoring the checkpoints of a run while it trains: each once, by any number of jobs, on devices of their own.

A job claims a step (checkpoint/claims.py), scores it, writes its scores and gives it free. That the
scores are there says that the step is done, so that a job which dies costs only the step it was at, which
another takes over.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.checkpoint.claims import Claim, Claims
from llm_jax.checkpoint.manager import read_run_files, steps_in
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.evals.evaluation import Evaluation
from llm_jax.metrics.report import refresh_report
from llm_jax.metrics.scores import collect_scores, scored_steps
from llm_jax.metrics.writer import write_events
from llm_jax.training.config import resolve
from llm_jax.training.stopping import Stopping

Score = Callable[[int], Evaluation | None]
_POLL = 5.0  # seconds between two looks
_NONE, _OVER = -1, -2  # in place of a step


class Watcher:
    """Scores steps as they come; `score` is called on every process of the job, the rest is process 0's.

    Args:
      patience: seconds after which another job's silence means that it is dead.

    Attributes:
      failed: step to what was wrong with its checkpoint.
    """

    def __init__(self, workdir: Path, score: Score, say: Callable[[str], None], *, patience: float):
        self._workdir, self._score, self._say = Path(workdir), score, say
        owner = f"evaluation on {socket.gethostname()}, process {os.getpid()}"
        self._claims = Claims(workdir, owner, patience=patience)
        self._poll = min(_POLL, patience / 4)
        self._gone: set[int] = set()
        self.failed: dict[int, str] = {}

    def run(self, *, once: bool) -> None:
        """Until training has ended and all is scored; once: until there is nothing left to take.

        Raises:
          RunError: nothing can be measured at all.
        """
        waiting = False
        while True:
            step, claim = self._next(once)
            if step == _OVER:
                return
            if step == _NONE:
                if not waiting:
                    self._say(f"waiting for checkpoints in {self._workdir}")
                waiting = True
                time.sleep(self._poll)
                continue
            waiting = False
            if claim is None:
                self._evaluate(step, claim)
                continue
            with claim.held():
                self._evaluate(step, claim)

    def _next(self, once: bool) -> tuple[int, Claim | None]:
        """What process 0 chose, and there its claim on it."""
        step, claim = self._choose(once) if jax.process_index() == 0 else (_NONE, None)
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int64(step)))
        return step, claim

    def _choose(self, once: bool) -> tuple[int, Claim | None]:
        """The oldest step that is neither scored nor another's."""
        try:
            steps = steps_in(self._workdir / "checkpoints")
        except ConfigError:  # training has not begun
            steps = []
        left = self._left(steps)
        for step in left:
            claim = self._claims.take(step)
            if claim is None:
                continue
            if step not in scored_steps(self._workdir):  # nobody was quicker
                return step, claim
            with claim.held():
                pass
        over = once or (not left and bool(steps) and self._has_ended(steps[-1]))
        return (_OVER if over else _NONE), None

    def _left(self, steps: list[int]) -> list[int]:
        done = {*scored_steps(self._workdir), *self.failed, *self._gone}
        return [step for step in steps if step not in done]

    def _has_ended(self, step: int) -> bool:
        """Whether training ends with this step."""
        try:
            files = read_run_files(self._workdir / "checkpoints", step)
            run = resolve(files.config)
        except (ConfigError, OSError):
            return False
        stopping = Stopping.saved(files.stopping, run.eval)
        return step >= run.train.num_steps or (stopping is not None and stopping.is_over(run.eval))

    def _evaluate(self, step: int, claim: Claim | None) -> None:
        began = time.monotonic()
        try:
            evaluation = self._score(step)
        except (ConfigError, OSError) as error:
            if (self._workdir / "checkpoints" / str(step)).is_dir():
                self.failed[step] = str(error)
                self._say(f"step {step} cannot be scored: {error}")
            else:
                self._gone.add(step)
                self._say(f"step {step} was removed before it was scored")
            return
        measured(evaluation, self._workdir)
        for problem in evaluation.problems:
            self._say(f"step {step}: {problem}")
        if claim is None:  # process 0 writes
            return
        if not claim.is_mine() or step in scored_steps(self._workdir):
            self._say(f"step {step} was taken over by another job, this one having been too slow")
            return
        publish(self._workdir, evaluation)
        self._say(
            f"step {step}: {headline(evaluation)}  ({time.monotonic() - began:.1f} s, "
            f"{len(self._left(steps_in(self._workdir / 'checkpoints')))} more to score)"
        )


def publish(workdir: Path, evaluation: Evaluation) -> Path:
    """Writes an evaluation's scores, for people and programs; gives its file."""
    write_events(workdir / "tensorboard" / "scores", evaluation.step, evaluation.summary)
    path = evaluation.save(workdir)
    collect_scores(workdir)
    refresh_report(workdir)
    return path


def measured(evaluation: Evaluation | None, workdir: Path) -> Evaluation:
    """An evaluation that found something.

    Raises:
      RunError: why it did not.
    """
    if evaluation is None:
        raise RunError(
            f"{workdir} has no held-out documents: see data.held_out_fraction, or set eval.tasks"
        )
    if not evaluation.summary:
        raise RunError("; ".join(evaluation.problems))
    return evaluation


def headline(evaluation: Evaluation, most: int = 5) -> str:
    """The first few figures in a line."""
    shown = [f"{name} {value:.4g}" for name, value in list(evaluation.summary.items())[:most]]
    return "  ".join(shown)
