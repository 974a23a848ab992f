"""Scoring the checkpoints of a run while it trains: each once, by any number of jobs, on devices of their own.

A job claims a step (checkpoint/claims.py), scores it, writes its scores and gives it free. That the
scores are there says that the step is done, so that a job which dies costs only the step it was at, which
another takes over.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
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
from llm_jax.metrics.scores import collect_scores, scores_path
from llm_jax.metrics.writer import write_events
from llm_jax.training.config import resolve
from llm_jax.training.guard import on_first_process
from llm_jax.training.stopping import Stopping

Score = Callable[[int], Evaluation | None]
_POLL = 5.0  # seconds between two looks
_NONE, _OVER = -1, -2  # in place of a step


class Watcher:
    """Scores steps as they come; `score` is called on every process of the job, the rest is process 0's.

    Args:
      patience: seconds after which another job's silence means that it is dead.
      labels: of tasks that this job asks beyond the run's own: a step whose scores lack them is not done.

    Attributes:
      failed: step to what was wrong with its checkpoint.
    """

    def __init__(
        self,
        workdir: Path,
        score: Score,
        say: Callable[[str], None],
        *,
        patience: float,
        labels: Sequence[str] = (),
    ):
        self._workdir, self._score, self._say = Path(workdir), score, say
        self._labels, self._done = labels, set()
        owner = f"evaluation on {socket.gethostname()}, process {os.getpid()}"
        self._claims = Claims(workdir, owner, patience=patience)
        self._poll = min(_POLL, patience / 4)
        self._damaged: dict[int, int] = {}  # step to when its folder was written
        self.failed: dict[int, str] = {}

    def run(self, *, once: bool) -> None:
        """Until training has ended and all is scored; once: until there is nothing left to take.

        Raises:
          RunError: nothing can be measured at all.
          ConfigError: once, and there is no folder of checkpoints.
        """
        waiting = idle = True
        while True:
            step, claim = self._next(once)
            if step == _OVER:
                if idle:
                    self._say(f"nothing is left to score in {self._workdir}")
                return
            if step == _NONE:
                if waiting:
                    self._say(f"waiting for checkpoints in {self._workdir}")
                waiting = False
                time.sleep(self._poll)
                continue
            waiting, idle = True, False
            if claim is None:
                self._evaluate(step, claim)
                continue
            with claim.held():
                self._evaluate(step, claim)

    def _next(self, once: bool) -> tuple[int, Claim | None]:
        """What process 0 chose, and there its claim on it."""
        step, claim = on_first_process(lambda: self._choose(once)) or (_NONE, None)
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int64(step)))
        return step, claim

    def _choose(self, once: bool) -> tuple[int, Claim | None]:
        """The oldest step that is neither scored nor another's."""
        try:
            steps = steps_in(self._workdir / "checkpoints")
        except ConfigError:  # training has not begun
            if once:
                raise
            steps = []
        left = self._left(steps)
        for step in left:
            claim = self._claims.take(step)
            if claim is None:
                continue
            if not self._is_done(step):  # nobody was quicker
                return step, claim
            with claim.held():
                pass
        over = once or (not left and bool(steps) and self._has_ended(steps[-1]))
        return (_OVER if over else _NONE), None

    def _left(self, steps: list[int]) -> list[int]:
        return [step for step in steps if not (self._is_done(step) or self._is_damaged(step))]

    def _is_done(self, step: int) -> bool:
        """Whether its scores are there, and in them what this job asks, or why it could not be asked."""
        path = scores_path(self._workdir, step)
        if not path.exists():
            return False
        if self._labels and step not in self._done:
            found = Evaluation.load(path)
            told = [*found.summary, *found.problems]
            if any(not any(t.startswith((f"{x}/", f"{x}:")) for t in told) for x in self._labels):
                return False
        self._done.add(step)
        return True

    def _is_damaged(self, step: int) -> bool:
        """Whether it could not be read, and has not been written anew since."""
        return step in self._damaged and self._damaged[step] == self._written(step)

    def _written(self, step: int) -> int | None:
        try:
            return (self._workdir / "checkpoints" / str(step)).stat().st_mtime_ns
        except OSError:
            return None

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
            if jax.process_count() > 1:  # the others may be waiting for this one within the model
                raise RunError(f"step {step} cannot be scored: {error}") from error
            written = self._written(step)
            if written is None:
                self._say(f"step {step} was removed before it was scored")
                return
            self.failed[step], self._damaged[step] = str(error), written
            self._say(f"step {step} cannot be scored: {error}")
            return
        measured(evaluation, self._workdir)
        for problem in evaluation.problems:
            self._say(f"step {step}: {problem}")
        if claim is None:  # process 0 writes
            return
        if not claim.is_mine():
            self._say(f"step {step} was taken over by another job, this one having been too slow")
            return
        publish(self._workdir, evaluation)
        self._done.add(step)
        self.failed.pop(step, None)
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
