"""How far a long job is: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from typing import Protocol, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    def say(self, line: str) -> None:
        """One line that stays."""

    def start(self, what: str, total: int) -> None:
        """A stage of `total` units begins."""

    def advance(self, count: int) -> None: ...

    def finish(self) -> None:
        """The stage ends."""


class Silent:
    def say(self, line: str) -> None: ...

    def start(self, what: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def finish(self) -> None: ...


class Lines:
    """For log files: a line at the start, at most one every ten seconds, and one at the end."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def start(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._shown = time.monotonic()
        self.say(f"{what}: {total:,} to go")

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            self.say(f"{self._what}: {self._done:,} of {self._total:,}, {left:.0f} s left")

    def finish(self) -> None:
        seconds = time.monotonic() - self._began
        self.say(f"{self._what}: {self._done:,} of {self._total:,} in {seconds:.1f} s")


class Bar:
    """For a terminal."""

    def __init__(self):
        import rich.console
        import rich.progress as parts

        self._console = rich.console.Console(stderr=True)
        self._columns = (
            parts.TextColumn("{task.description}"),
            parts.BarColumn(),
            parts.MofNCompleteColumn(),
            parts.TimeElapsedColumn(),
            parts.TimeRemainingColumn(),
        )
        self._make = parts.Progress

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def start(self, what: str, total: int) -> None:
        self._bar = self._make(*self._columns, console=self._console)
        self._task = self._bar.add_task(what, total=total)
        self._bar.start()

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def finish(self) -> None:
        self._bar.stop()


def make_progress(stream: TextIO | None = None) -> Progress:
    """A bar if standard error is a terminal, else lines on it."""
    stream = stream or sys.stderr
    return Bar() if stream.isatty() else Lines(stream)
