"""Who works on which checkpoint: how evaluation jobs share a run's steps, and training spares what is read.

    WORKDIR/evals/claims/<step>.<attempt>     made by one process alone; its owner writes to it while it lives

A step belongs to the owner of its last attempt. An owner that has not written for `patience` seconds is
dead, and whoever makes the next attempt takes its step over; one that was only slow finds out before it
publishes. Training claims a checkpoint before it removes it, in the same way, so that neither can come
between the other's look and its deed. Needs no locks and no renames, only that a file can be made
exclusively, which local disks, NFS and mounted buckets offer; and no common clock, since ages are taken
from the file system's own stamps.
"""

import contextlib
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

# Seconds of silence after which an owner counts as dead: mounted buckets may show stamps a minute old.
PATIENCE = 180.0
_BEATS = 4  # signs of life in that time, at least
_IS_CLAIM = re.compile(r"\d+\.\d+").fullmatch


class Claim:
    """A step that is this process's while it beats."""

    def __init__(self, path: Path, step: int, owner: str, patience: float):
        self.step, self._path, self._owner = step, path, owner
        self._pause, self._over = patience / (_BEATS + 1), threading.Event()
        self._count = 0

    @contextlib.contextmanager
    def held(self) -> Iterator["Claim"]:
        """Beats from a thread until the end, then gives the step free, if it is still this process's."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()
            if self.is_mine():
                for path in _attempts(self._path.parent, self.step):
                    path.unlink(missing_ok=True)

    def is_mine(self) -> bool:
        """Whether nobody has taken the step over."""
        return _last(self._path.parent, self.step) == self._path

    def _beat(self) -> None:
        while not self._over.wait(self._pause):
            self._count += 1
            with contextlib.suppress(OSError):  # a full disk: others may take over, which is told
                if not self.is_mine():
                    return
                with open(self._path, "r+") as file:  # does not make what another has removed
                    file.write(f"{self._owner} {self._count}\n")


class Claims:
    """The claims of a run.

    Args:
      workdir: the run's.
      owner: shown to people.
    """

    def __init__(self, workdir: Path, owner: str, *, patience: float = PATIENCE):
        self.folder = Path(workdir) / "evals" / "claims"
        self._owner, self._patience = owner, patience

    def take(self, step: int) -> Claim | None:
        """The step, or None while a live process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        last = _last(self.folder, step)
        if last is not None and not self._is_stale(last):
            return None
        attempt = 0 if last is None else _attempt(last) + 1
        path = self.folder / f"{step}.{attempt}"
        # A mounted bucket may tell only on closing that another was first.
        try:
            with open(path, "x") as file:
                file.write(f"{self._owner} 0\n")
        except FileExistsError:
            return None
        except OSError:
            if path.exists():
                return None
            raise
        return Claim(path, step, self._owner, self._patience)

    def holder(self, step: int) -> str | None:
        """Who has the step now, if that one lives."""
        last = _last(self.folder, step)
        if last is None or self._is_stale(last):
            return None
        try:
            return last.read_text().rpartition(" ")[0] or "unknown"
        except OSError:
            return None

    def forget(self, there: Iterable[int]) -> None:
        """Removes the claims of steps that are not there any more."""
        kept = set(there)
        for path in _all(self.folder):
            if _step(path) not in kept:
                path.unlink(missing_ok=True)

    def _is_stale(self, path: Path) -> bool:
        now = self._now()
        try:
            return now - path.stat().st_mtime > self._patience
        except FileNotFoundError:  # given free
            return True

    def _now(self) -> float:
        """What the file system's clock says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".{secrets.token_hex(8)}.now"
        probe.write_text("now\n")
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now


def _all(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if _IS_CLAIM(path.name)]
    except FileNotFoundError:
        return []


def _attempts(folder: Path, step: int) -> list[Path]:
    return [path for path in _all(folder) if _step(path) == step]


def _last(folder: Path, step: int) -> Path | None:
    return max(_attempts(folder, step), key=_attempt, default=None)


def _step(path: Path) -> int:
    return int(path.name.partition(".")[0])


def _attempt(path: Path) -> int:
    return int(path.name.partition(".")[2])
