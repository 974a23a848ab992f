"""Where a run's numbers go: metrics.jsonl, TensorBoard events and the terminal.

metrics.jsonl is the record; the report and every other reader use it alone. One JSON object per
line, the step first, each line written whole and at once. It is standard JSON: a number that is
not finite is null and its key stands in the record's "nonfinite" list. When a run resumes, what was
recorded past the restored step is cut off, so the file reads as if the run had never stopped.

Unusual: events are framed here, with tensorboardX's protos and checksums, because its SummaryWriter
writes from a thread, where a full disk prints a traceback and then blocks the training loop.
"""

import collections
import contextlib
import json
import math
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

METRICS_FILE = "metrics.jsonl"
PROGRESS = ("auto", "bar", "lines", "none")
RESERVED = ("step", "nonfinite")
_EVENTS = "brain.Event:2"


class MetricWriter:
    """Writes what `write` is given to every sink, and draws the progress of the run.

    Args:
      workdir: a local (or mounted) directory; made if absent.
      num_steps: the last step of the run.
      start_step: the step restored from, 0 for a fresh run; later records are removed.
      enabled: False on processes other than 0: nothing is made, read or printed.
      progress: "bar" (needs a terminal), "lines", "none", or "auto" to choose between the first two.

    Raises:
      ValueError: an unknown `progress`, or a remote `workdir`.
      OSError: from here and from every write, e.g. when the disk is full. The record that failed is
        then taken back, so metrics.jsonl stays whole and a later write may succeed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        num_steps: int,
        start_step: int,
        enabled: bool = True,
        progress: str = "auto",
    ):
        if progress not in PROGRESS:
            raise ValueError(f"progress = {progress!r}; choices: {', '.join(PROGRESS)}")
        if "://" in os.fspath(workdir):
            raise ValueError(
                f"workdir = {os.fspath(workdir)!r}: metrics are appended to a file, which needs a "
                "local or mounted directory"
            )
        self._enabled = enabled
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        _cut_records(workdir / METRICS_FILE, start_step)
        self._pace = _Pace(num_steps)
        with contextlib.ExitStack() as opened:
            self._records = opened.enter_context(_AppendFile(workdir / METRICS_FILE))
            self._events = opened.enter_context(_EventFile(workdir / "tensorboard", start_step))
            self._display = opened.enter_context(_make_display(progress, num_steps, start_step))
            self._opened = opened.pop_all()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the training metrics of `step`, and moves the progress on to it.

        Raises:
          ValueError: a metric is called "step" or "nonfinite".
        """
        if self._enabled:
            self._record(step, metrics)
            self._display.update(step, metrics, self._pace.seconds_left(step))

    def write_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records held-out metrics of `step`, each key prefixed with "eval/"."""
        if self._enabled:
            self._record(step, {f"eval/{key}": value for key, value in metrics.items()})
            numbers = (f"{key} {_shown(float(value))}" for key, value in metrics.items())
            self._display.message("  ".join([f"eval {step}/{self._pace.num_steps}", *numbers]))

    def message(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._enabled:
            self._display.message(text)

    def close(self) -> None:
        """Closes the files and gives the terminal back; may be called twice."""
        if self._enabled:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._records.append(encode(step, metrics))
        self._events.append(step, metrics)


def read_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields (line, record) of a metrics.jsonl; lines that are not whole records, newline included
    (torn by a crash), are passed over. An absent file yields nothing.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            whole = isinstance(record, dict) and isinstance(record.get("step"), int)
            if whole and line.endswith(b"\n"):
                yield line, record


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file under another name and moves it over `path`: readers see all of it or nothing."""
    # In containers every process may be number 1, and several write to one bucket.
    writer = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    partial = path.with_name(f"{path.name}.{writer}.partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _cut_records(path: Path, last_step: int) -> None:
    kept = sum(len(line) for line, record in read_records(path) if record["step"] <= last_step)
    # Lines are kept as they are, so an equal length means that nothing has to go.
    if path.exists() and kept != path.stat().st_size:
        lines = (line for line, record in read_records(path) if record["step"] <= last_step)
        replace_file(path, lines)


def encode(step: int, metrics: Mapping[str, float]) -> bytes:
    """A record as a line of a .jsonl file."""
    record: dict[str, Any] = {"step": int(step)}
    nonfinite = []
    for key, value in metrics.items():
        if key in RESERVED:
            raise ValueError(f"metric {key!r}: the name is taken; reserved: {', '.join(RESERVED)}")
        number = int(value) if isinstance(value, int) else float(value)
        finite = math.isfinite(number)
        record[key] = number if finite else None
        if not finite:
            nonfinite.append(key)
    if nonfinite:
        record["nonfinite"] = nonfinite
    return json.dumps(record, allow_nan=False).encode() + b"\n"


class _AppendFile:
    """Appends all of a record or none of it. Unbuffered: after an error nothing is left behind
    that close, or the interpreter's exit, would try to write again.
    """

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 closed by __exit__

    def append(self, data: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def write_events(directory: Path, step: int, metrics: Mapping[str, float]) -> Path:
    """TensorBoard scalars of one step as a file of their own, whole or not at all.

    Files are read in the order of their names, which is that of the steps.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"events.out.tfevents.{step:010d}.scores"
    replace_file(path, [_event(file_version=_EVENTS), _event(step=step, summary=_summary(metrics))])
    return path


class _EventFile:
    """TensorBoard scalars as they come."""

    def __init__(self, directory: Path, start_step: int):
        from tensorboardX.proto import event_pb2

        directory.mkdir(exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = _AppendFile(directory / name)
        # A START hides what earlier files hold from this step on (SummaryWriter's purge_step).
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        head = _event(file_version=_EVENTS)
        self._file.append(head + _event(step=start_step + 1, session_log=start))

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.append(_event(step=int(step), summary=_summary(metrics)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._file.__exit__()


def _summary(metrics: Mapping[str, float]):
    from tensorboardX.proto import summary_pb2

    value = summary_pb2.Summary.Value
    values = [value(tag=key, simple_value=float(number)) for key, number in metrics.items()]
    return summary_pb2.Summary(value=values)


def _event(**fields) -> bytes:
    """An Event proto in a TFRecord frame."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    checksum = lambda data: struct.pack("<I", masked_crc32c(data))  # noqa: E731
    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


class _Pace:
    """Time left, from the last few writes: the first steps compile and do not count for long."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=16)

    def seconds_left(self, step: int) -> float | None:
        """Seconds until the last step; None before two writes of different steps."""
        self._marks.append((time.monotonic(), step))
        (first_time, first_step), (last_time, _) = self._marks[0], self._marks[-1]
        if step <= first_step:
            return None
        return (last_time - first_time) / (step - first_step) * max(0, self.num_steps - step)


def _make_display(progress: str, num_steps: int, start_step: int) -> "_Lines | _Bar":
    if progress == "auto":
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        progress = "bar" if terminal else "lines"
    if progress == "bar":
        return _Bar(num_steps, start_step)
    return _Lines(num_steps, silent=progress == "none")


class _Lines:
    """One plain line per write: for logs, pipes and batch jobs."""

    def __init__(self, num_steps: int, silent: bool):
        self._num_steps = num_steps
        self._silent = silent

    def update(self, step: int, metrics: Mapping[str, float], seconds_left: float | None) -> None:
        numbers = _headline(metrics, seconds_left, ("loss", "learning_rate", "grad_norm"))
        self.message("  ".join([f"step {step}/{self._num_steps}", *numbers]))

    def message(self, text: str) -> None:
        if not self._silent:
            print(text, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass


class _Bar:
    """A bar on a terminal, drawn at each write: no thread takes time from the training loop."""

    def __init__(self, num_steps: int, start_step: int):
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}", markup=False),
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=num_steps, completed=start_step, numbers="compiling"
        )

    def update(self, step: int, metrics: Mapping[str, float], seconds_left: float | None) -> None:
        numbers = "  ".join(_headline(metrics, seconds_left, ("loss",)))
        self._progress.update(self._task, completed=step, numbers=numbers, refresh=True)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()


_FORMATS = {
    "loss": lambda value: f"loss {_shown(value)}",
    "learning_rate": lambda value: f"lr {value:.1e}",
    "grad_norm": lambda value: f"grad_norm {_shown(value, 2)}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "mfu": lambda value: f"mfu {value:.1%}",
}


def _headline(
    metrics: Mapping[str, float], seconds_left: float | None, keys: tuple[str, ...]
) -> list[str]:
    keys = (*keys, "tokens_per_second", "mfu")
    numbers = [_FORMATS[key](float(metrics[key])) for key in keys if key in metrics]
    return numbers if seconds_left is None else [*numbers, f"left {_duration(seconds_left)}"]


def _shown(value: float, decimals: int = 3) -> str:
    plain = 10**-decimals <= abs(value) < 1e5 or value == 0 or not math.isfinite(value)
    return f"{value:.{decimals}f}" if plain else f"{value:.{decimals}e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
