"""The training loop: dispatch a step, place the next batch while it runs, read old metrics."""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from llm_jax.checkpoint.manager import Checkpointer, RunFiles
from llm_jax.core.config import nearest
from llm_jax.core.flags import RunError
from llm_jax.core.types import Batch, Weighted
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.config import RunConfig
from llm_jax.training.guard import StopRequest, check_finite
from llm_jax.training.program import Program
from llm_jax.training.speed import throughput
from llm_jax.training.state import TrainState
from llm_jax.training.stopping import Stopping, after

# Steps the host may run ahead of the device: enough to hide the host, few enough to bound memory.
STEPS_IN_FLIGHT = 2


class Loader(Protocol):
    def __next__(self) -> Mapping[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def epochs(self) -> dict[str, float]: ...


class Writer(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def write_eval(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """state: where the run stands; stopped_by: the signal that ended it early, or None.

    best_step: the step that did best on held-out data, if that is looked for; its checkpoint is kept.
    """

    state: TrainState
    stopped_by: str | None
    best_step: int | None = None


class Loop:
    """Runs `program.step` until the last step, a stop request, or the end of patience."""

    def __init__(
        self,
        run: RunConfig,
        program: Program,
        loader: Loader,
        checkpointer: Checkpointer,
        writer: Writer,
        *,
        files: Callable[[dict], RunFiles],
        held_out: Callable[[], Any],
        ask: Callable[[int, TrainState], Mapping[str, float]],
        stopping: Stopping | None = None,
    ):
        """Takes all parts of a run.

        Args:
          files: what goes beside the arrays of a checkpoint, given the loader's state.
          held_out: a fresh pass over the held-out batches, with `close`.
          ask: figures of `eval.tasks` at a step.
          stopping: of early stopping, where a run goes on.
        """
        self.run, self.program, self.loader = run, program, loader
        self.checkpointer, self.writer = checkpointer, writer
        self.files, self.held_out, self.ask, self.stopping = files, held_out, ask, stopping
        self.last_saved: int | None = None
        self._resumed = False
        self._pending: collections.deque[tuple[int, dict, dict]] = collections.deque()
        self._clock: tuple[int, float] | None = None  # a finished step and when it was seen

    def fit(self, state: TrainState) -> Outcome:
        """Trains from `state.step` to the end.

        Raises:
          RunError: the loss is not finite. The last checkpoint stays.
        """
        step, last = int(state.step), self.run.train.num_steps
        self.last_saved, self._resumed = step or None, step > 0
        with StopRequest() as request, self.checkpointer.finishing():
            goes_on = step < last and not self._is_over()
            batch, epochs = self._draw(step + 1) if goes_on else (None, {})
            while goes_on:
                state, metrics = self.program.step(state, batch)
                step += 1
                self._pending.append((step, metrics, epochs))
                stop = request.agreed(step)
                self._evaluate(step, state)
                goes_on = step < last and not stop and not self._is_over()
                # Before the next batch is drawn, so that the loader's state is that of this step.
                if not goes_on or self._is_saved(step):
                    self._save(step, state)
                if goes_on:
                    batch, epochs = self._draw(step + 1)
                    self._read(keep=STEPS_IN_FLIGHT)
            self._read(keep=0)
        is_over = step >= last or self._is_over()
        best_step = self.stopping.step if self.stopping else None
        return Outcome(state, None if is_over else request.name, best_step)

    def _is_over(self) -> bool:
        """Whether patience has ended."""
        return self.stopping is not None and self.stopping.is_over(self.run.eval)

    def _is_due(self, every: int | None, step: int) -> bool:
        """The last step is left to what concludes the run, unless it may be the best one."""
        if every is None:
            return False
        if step == self.run.train.num_steps:
            return self.run.eval.patience is not None
        return step % every == 0

    def _is_saved(self, step: int) -> bool:
        is_best = self.stopping is not None and self.stopping.step == step
        return is_best or step % self.run.checkpoint.save_every == 0

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Held-out loss and tasks, each where its turn has come."""
        config, means = self.run.eval, {}
        if self._is_due(config.every, step):
            self._read(keep=0)
            means |= self._held_out_means(state)
            if not means and config.patience is not None and not config.tasks:
                raise RunError("eval.patience needs held-out documents: see data.held_out_fraction")
        if self._is_due(config.tasks_every, step):
            self._read(keep=0)
            means |= self.ask(step, state)
        if means:
            self.writer.write_eval(step, means)
            self._note(step, means)
            self._clock = None  # the pause is not the step's

    def _held_out_means(self, state: TrainState) -> dict[str, float]:
        """Over at most `eval.max_batches` batches; empty where nothing is held out."""
        total: dict[str, Weighted] | None = None
        with contextlib.closing(self.held_out()) as batches:
            for rows in itertools.islice(batches, self.run.eval.max_batches):
                batch = to_global_batch(rows, self.program.rules, self.run.train.microbatch_size)
                sums = self.program.evaluate(state.params, state.extra, batch)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {name: float(value.mean) for name, value in (total or {}).items()}

    def _note(self, step: int, means: Mapping[str, float]) -> None:
        config = self.run.eval
        of_a_task = config.metric.partition("/")[0] in config.labels
        asked = self._is_due(config.tasks_every if of_a_task else config.every, step)
        if config.patience is None or not asked:
            return
        if config.metric not in means:
            raise RunError(
                f"eval.metric {config.metric!r} is not measured{nearest(config.metric, means)}; "
                f"there are: {', '.join(means)}"
            )
        self.stopping = after(self.stopping, config.metric, step, means)
        if self._is_over():
            self.writer.message(
                f"{config.metric} has been no better for {config.patience} evaluations than at step "
                f"{self.stopping.step}: training ends, and that step is used"
            )

    def _draw(self, step: int) -> tuple[Batch, dict[str, float]]:
        """The batch of this step, on its way to the devices; and the epochs it ends, if logged."""
        rows = next(self.loader)
        batch = to_global_batch(rows, self.program.rules, self.run.train.batch_size)
        epochs = self.loader.epochs() if self._is_logged(step) else {}
        return batch, {f"epoch/{name}": value for name, value in epochs.items()}

    def _is_logged(self, step: int) -> bool:
        return step % self.run.train.log_every == 0 or step == self.run.train.num_steps

    def _save(self, step: int, state: TrainState) -> None:
        self._read(keep=0)  # a state whose loss is not finite is never saved
        files = self.files(self.loader.get_state())
        if self.stopping is not None:
            files = dataclasses.replace(files, stopping=self.stopping.to_dict())
        self.checkpointer.save(step, state, files)
        self.last_saved = step

    def _read(self, keep: int) -> None:
        """Reads the metrics of all but the newest `keep` steps, which the device has finished."""
        while len(self._pending) > keep:
            step, arrays, epochs = self._pending.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
            check_finite(step, metrics, self.last_saved)
            if self._clock is None:
                self._clock = (step, time.perf_counter())
            if self._is_logged(step):
                marks = {"resumed": 1.0} if self._resumed else {}
                self._resumed = False
                self.writer.write(step, metrics | self._speed(step) | epochs | marks)

    def _speed(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        before, then = self._clock
        self._clock = (step, now)
        if step == before:
            return {}
        return throughput(self.run, self.program.mesh, (step - before) / (now - then))
