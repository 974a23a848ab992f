"""What may end a run early: signals, a second run in the workdir, a loss that is no number."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.core.flags import RunError
from llm_jax.training import peers

# What the shell makes of a process that died of these signals; schedulers tell by it.
EXIT_STATUS = {"SIGTERM": 128 + signal.SIGTERM, "SIGINT": 128 + signal.SIGINT}


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the loop can save and leave. A second Ctrl-C leaves at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.name: str | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step.

        Several processes must stop at the same step, so they agree on one (peers.py).
        """
        watch = peers.active()
        if watch is None:
            return self.name is not None
        if self.name is not None:
            watch.request_stop(self.name)
        agreed = watch.stops_at(step)
        self.name = agreed or self.name
        return agreed is not None


def on_first_process(function: Callable[[], Any]) -> Any:
    """Runs `function` on process 0 while the others wait; its result there, None on the others.

    Raises:
      RunError: on the others, when it failed on process 0, where the error itself is raised.
    """
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except BaseException as caught:
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
        if failed and error is None:
            raise RunError("process 0 failed; the reason is in its output")
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds `workdir/.lock`; the lock ends with the process, however it ends.

    Raises:
      RunError: another live run holds it.
    """
    file = on_first_process(lambda: _locked(workdir))
    with file or contextlib.nullcontext():
        yield


def _locked(workdir: Path) -> IO[str]:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / ".lock", "a+")  # noqa: SIM115  open for as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunError(
            f"{workdir} is in use by process {file.read().strip() or 'unknown'}: "
            "wait for it, stop it, or choose another --workdir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_finite(step: int, metrics: Mapping[str, float], last_good: int | None) -> None:
    """Raises RunError when loss or gradient norm of a step is not finite."""
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            kept = (
                "there is no checkpoint yet" if last_good is None else f"step {last_good} is kept"
            )
            raise RunError(
                f"{name} is {metrics[name]} at step {step} (batch {step - 1}): training stopped, "
                f"{kept}; try a lower schedule.learning_rate or a longer schedule.warmup_steps"
            )
