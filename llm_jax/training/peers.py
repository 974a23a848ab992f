"""What the processes of a job tell each other beside the training itself.

A process that is lost leaves the others in a collective that never ends, or that fails with whatever
the network library has to say. So each process beats in the key-value store of jax's coordination
service and listens to the next one in a ring: the traffic grows with the number of processes, not
with its square. A process that falls silent, or that ends with an error and says so, ends the job:
every other one prints one line that names it and exits with PEER_LOST, from a thread, since the main
thread may hang. Checkpoints stay whole, because Orbax commits them by a rename.

The same store carries the agreement to stop at one step after a signal (`stops_at`), without a
collective that would wait for the steps in flight.

The store lives in a process beside process 0 (sharding/coordinator.py), so that it answers when
process 0 is gone; when it does not answer either, the host of process 0 is gone.
"""

import atexit
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed

from llm_jax.core.flags import first_line

PEER_LOST = os.EX_TEMPFAIL  # 75: nothing is wrong with this process; start it again
_ROOT = "llm_jax"
_BEATS, _STEPS, _NOTICES = f"{_ROOT}/beat", f"{_ROOT}/step", f"{_ROOT}/notice"
# A collective has failed somewhere, so somebody is gone: this many missed beats tell who.
_BEATS_IN_ALARM = 5
_EXPLAINING, _EXPLAINED = f"{_ROOT}/explaining", f"{_ROOT}/explained"
# Processes that fail in the same step do so within seconds; a step compiles within minutes.
_UNTIL_EXPLAINING_MS, _UNTIL_EXPLAINED_MS = 15_000, 900_000
_LEFT = "left"
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED): ")

_active: "Watch | None" = None


def active() -> "Watch | None":
    """The watch of this process, within `watching` and among several processes."""
    return _active


@contextlib.contextmanager
def watching(timeout: float, checkpoints: Path) -> Iterator[None]:
    """Watches over the other processes for as long as the body runs; does nothing for one process.

    An error in the body is announced, so that the others end at once and name it. An error that a
    lost process caused here (a collective that failed) waits until the watch has found that process,
    which ends this one too.

    Args:
      timeout: seconds of silence after which a process is taken for lost. The beats come from a
        thread, so that compiling, saving and evaluating do not count as silence.
      checkpoints: the folder whose newest step the last line names.
    """
    global _active
    state = distributed.global_state
    if state.client is None:
        yield
        return
    # Not jax.process_index(): it starts the backends, which wait for the others, and a process lost
    # by then would be missed by nobody.
    watch = Watch(state.client, state.process_id, state.num_processes, timeout, checkpoints)
    watch.start()
    _active = watch
    try:
        yield
        watch.leave()
    except BaseException as error:
        if _from_a_collective(error):
            watch.wait_for_the_cause()
        watch.announce(f"ended: {first_line(error)}")
        _leave_without_the_others()
        raise
    finally:
        _active = None


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """For an error that all processes are likely to meet at once: the body of process 0 may take its time
    to say why, and the others wait for it on their way out.

    Without that, the first to end would end the rest, by way of the watch or of whoever started them.
    """
    watch = _active
    if watch is None:
        yield
        return
    watch.explain_first()
    try:
        yield
    finally:
        watch.await_explanation()


class Watch:
    """One process's ear on the others.

    A thread exchanges beats and notices with the store and may block in that; a second one looks at
    the clock only.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        timeout: float,
        checkpoints: Path,
    ):
        self._client, self._index, self._count = client, index, count
        self._timeout, self._checkpoints = timeout, checkpoints
        self._interval = min(timeout / 10, max(1.0, count / 100))
        self._host = socket.gethostname()
        self._next = _Neighbor((index + 1) % count)
        self._answered = time.monotonic()  # when the store last did
        self._alarmed = False
        self._stopped = threading.Event()
        self._beating = threading.Lock()  # no beat follows the word that this process has left
        self._left = False
        self._turn = threading.Condition()  # guards what follows
        self._wanted: str | None = None  # the signal that this process got
        self._stop: str | None = None  # the signal that all stop for
        self._step = 0
        self._told: int | None = None  # the step that this process told the others
        self._target: int | None = None
        self._ending = threading.Lock()  # taken once, by the thread that ends the process

    def start(self) -> None:
        for target in (self._beat, self._judge):
            threading.Thread(target=target, name="peers", daemon=True).start()

    def leave(self) -> None:
        """The work is done: this process's silence means nothing from here on.

        It goes on to watch until the others are done too: what follows, jax's own end, waits for
        them without a word.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            with self._beating:
                self._left = True
                self._client.key_value_set(f"{_BEATS}/{self._index}", _LEFT, allow_overwrite=True)
            # Others may be about to agree on a step to stop at.
            self._client.key_value_set(f"{_STEPS}/{self._index}", str(self._step))
        while not self._all_left():
            time.sleep(self._interval)
        self._stopped.set()

    def _all_left(self) -> bool:
        try:
            beats = [beat for _, beat in self._client.key_value_dir_get(_BEATS)]
        except jax.errors.JaxRuntimeError:
            return False  # the judge sees the silence
        return len(beats) == self._count and all(beat == _LEFT for beat in beats)

    def announce(self, what: str) -> None:
        """Tells the others that this process ends, and why."""
        self._notice("end", f"process {self._index} (host {self._host}) {what}")
        self._stopped.set()

    def explain_first(self) -> None:
        """From here on nobody else's end ends this process; process 0 says that it is explaining."""
        self._ending.acquire(blocking=False)
        if self._index == 0:
            self._say(_EXPLAINING)

    def await_explanation(self) -> None:
        """Process 0 says that it is done; the others wait for that, if it has begun."""
        if self._index == 0:
            self._say(_EXPLAINED)
            return
        # Process 0 may have met no such error, or be gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.blocking_key_value_get(_EXPLAINING, _UNTIL_EXPLAINING_MS)
            self._client.blocking_key_value_get(_EXPLAINED, _UNTIL_EXPLAINED_MS)

    def _say(self, key: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is there to hear it
            self._client.key_value_set(key, "")

    def wait_for_the_cause(self) -> None:
        """Returns if after all nobody is lost; else this process ends in here."""
        self._notice("alarm", str(self._index))
        time.sleep((_BEATS_IN_ALARM + 4) * self._interval)
        while time.monotonic() - self._answered > 2 * self._interval:
            time.sleep(self._interval)  # the judge gives the store its full time

    def request_stop(self, signal_name: str) -> None:
        with self._turn:
            self._wanted = signal_name

    def stops_at(self, step: int) -> str | None:
        """The signal for which all processes stop after this step; None to go on.

        Called after every step, on every process. When a signal is known, each process tells the
        others its step and waits here until all have: none of them can pass the step that follows
        the greatest, and that is where all stop.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._told is None or self._target is not None)
            self._step = step
            return self._stop if self._target is not None and step >= self._target else None

    def _beat(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the judge sees the silence
                self._exchange()
            waiting = self._told is not None and self._target is None
            self._stopped.wait(0.05 if waiting else self._interval)

    def _exchange(self) -> None:
        beat = f"{time.monotonic()} {self._host}"
        with self._beating:
            if not self._left:
                self._client.key_value_set(f"{_BEATS}/{self._index}", beat, allow_overwrite=True)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no beat yet
            self._next.hear(self._client.key_value_try_get(f"{_BEATS}/{self._next.index}"))
        notices = self._client.key_value_dir_get(_NOTICES)
        self._answered = time.monotonic()
        self._heed({key.rpartition("/")[2]: text for key, text in notices})

    def _heed(self, notices: dict[str, str]) -> None:
        self._alarmed = "alarm" in notices
        # What ended another process may be about to end this one too: its own words come first.
        if "end" in notices and not self._stopped.wait(self._interval):
            self._end(notices["end"])
        with self._turn:
            wanted, self._stop = self._wanted, notices.get("stop")
        if self._stop is not None:
            self._settle()
        elif wanted is not None:
            self._notice("stop", wanted)

    def _settle(self) -> None:
        """Finds the step to stop at, once: the one after the greatest that any process is at."""
        with self._turn:
            if self._target is not None:
                return
            if self._told is None:
                self._told = self._step
        mine = f"{_STEPS}/{self._index}"
        self._client.key_value_set(mine, str(self._told), allow_overwrite=True)
        steps = [int(step) for _, step in self._client.key_value_dir_get(_STEPS)]
        if len(steps) == self._count:
            with self._turn:
                self._target = max(steps) + 1
                self._turn.notify_all()

    def _judge(self) -> None:
        while not self._stopped.wait(self._interval / 2):
            limit = _BEATS_IN_ALARM * self._interval if self._alarmed else self._timeout
            unanswered = time.monotonic() - self._answered
            # The neighbor's silence counts up to the last answer: without one, nothing is known.
            silent = self._answered - self._next.heard
            if unanswered > self._timeout:
                self._end(
                    f"process 0 ({distributed.global_state.coordinator_address}), which "
                    f"coordinates, has not answered for {unanswered:.0f} s"
                )
            elif silent > limit and not self._next.left:
                message = f"{self._next} has not been heard of for {silent:.0f} s"
                self._notice("end", message)
                self._end(message)

    def _notice(self, kind: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first one counts
            self._client.key_value_set(f"{_NOTICES}/{kind}", text)

    def _end(self, message: str) -> None:
        if not self._ending.acquire(blocking=False):
            return
        step = _newest_step(self._checkpoints)
        kept = (
            "there is no checkpoint yet" if step is None else f"the last checkpoint is step {step}"
        )
        print(
            f"{message}: this process ends; {kept}; start again to go on",
            file=sys.stderr,
            flush=True,
        )
        if self._index == 0:
            # Where the end of process 0 ends its container, the store must have told the others.
            time.sleep(2 * self._interval)
        _exit(PEER_LOST)


class _Neighbor:
    """The process that this one listens to."""

    def __init__(self, index: int):
        self.index = index
        self.heard = time.monotonic()
        self.left = False
        self._beat, self._host = "", "unknown"

    def __str__(self) -> str:
        return f"process {self.index} (host {self._host})"

    def hear(self, beat: str) -> None:
        if beat == self._beat:
            return
        self.heard, self._beat = time.monotonic(), beat
        self.left = beat == _LEFT
        if not self.left:
            self._host = beat.partition(" ")[2]


def _newest_step(checkpoints: Path) -> int | None:
    try:
        return max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=None)
    except OSError:
        return None


def _from_a_collective(error: BaseException) -> bool:
    """Whether a lost process can be behind this error; out of memory is one's own fault."""
    while error is not None:
        # Some of jax's runtime errors arrive as a ValueError: their status code tells. Other libraries
        # use the same codes.
        is_jaxs = isinstance(error, ValueError) and _STATUS.match(str(error))
        if isinstance(error, jax.errors.JaxRuntimeError) or is_jaxs:
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__ or error.__context__
    return False


def _leave_without_the_others() -> None:
    """Ends this process soon with status 1, after Python has reported the error in flight.

    At its normal end jax waits for the other processes, and Orbax's threads may too; they are about
    to end in their own way.
    """
    atexit.register(_exit, 1)  # before jax's own, registered earlier
    timer = threading.Timer(10.0, _exit, (1,))
    timer.daemon = True
    timer.start()


def _exit(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
