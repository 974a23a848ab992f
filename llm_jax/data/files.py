"""Which files a path names, and reading pieces of them: a file, a folder, a glob, or a URL.

Local files are read with `pread`, without a shared position, so threads need no lock. URLs
(`gs://`, `s3://`, `memory://`) go through fsspec. What is kept per file is its name and its size.
"""

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError


class FileSet:
    """Files below one root in sorted order; `names[i]` is relative to it, `sizes[i]` is in bytes."""

    def __init__(self, root: str, found: dict[str, int], filesystem: Any = None):
        self.root = root
        self.names = sorted(found)
        self.sizes = np.array([found[name] for name in self.names], np.int64)
        self._filesystem = filesystem

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_remote(self) -> bool:
        return self._filesystem is not None

    def path(self, number: int) -> str:
        name = self.names[number]
        return f"{self.root}/{name}" if self.is_remote else os.path.join(self.root, name)

    def open(self, number: int):
        """A binary file object."""
        if self.is_remote:
            return self._filesystem.open(self.path(number), "rb")
        return open(self.path(number), "rb")

    def read(self, number: int, start: int = 0, end: int | None = None) -> bytes:
        """Bytes start..end of one file; the file is closed again."""
        with self.open(number) as file:
            if start:
                file.seek(start)
            return file.read(-1 if end is None else end - start)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of names and sizes. Times are left out: a copy of a corpus is the same corpus."""
        digest = hashlib.blake2b(digest_size=16)
        for name, size in zip(self.names, self.sizes, strict=True):
            digest.update(f"{size} {name}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def identity(self, number: int) -> str:
        """Of one file with its time of change: names what is cached about its contents."""
        path = self.path(number)
        changed = "" if self.is_remote else os.stat(path).st_mtime_ns
        text = f"{os.path.abspath(path)} {self.sizes[number]} {changed}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def find_files(path: str, suffixes: Sequence[str] = (), exclude: Sequence[str] = ()) -> FileSet:
    """The files that `path` names.

    Args:
      path: a file (taken whatever its suffix), a folder (searched to the bottom, hidden files and
        folders left out), a glob (`**` crosses folders), or a URL of any of these.
      suffixes: what names in a folder must end in; empty for all.
      exclude: globs; one without a slash is compared with each part of the relative path.

    Raises:
      ConfigError: nothing is there, or nothing matches.
    """
    search = _search_remote(path) if "://" in path else _search_local(path, exclude)
    if not search.found:
        raise ConfigError(f"data: no file at {path!r}")
    kept = {n: size for n, size in search.found.items() if not is_excluded(n, exclude)}
    if not kept:
        raise ConfigError(f"data: {path!r}: all its {len(search.found)} files are excluded")
    if search.is_folder and suffixes:
        kept = {n: size for n, size in kept.items() if n.endswith(tuple(suffixes))}
    if not kept:
        endings = ", ".join(suffixes)
        raise ConfigError(
            f"data: {path!r}: none of its {len(search.found)} files ends in {endings}; name others by "
            "a glob or by suffixes"
        )
    return FileSet(search.root, kept, search.filesystem)


@dataclasses.dataclass(frozen=True)
class _Search:
    """found: sizes in bytes by name relative to `root`."""

    root: str
    found: dict[str, int]
    is_folder: bool = False
    filesystem: Any = None


def is_excluded(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split("/")
    return any(
        fnmatch.fnmatch(name, pattern)
        if "/" in pattern
        else any(fnmatch.fnmatch(part, pattern) for part in parts)
        for pattern in patterns
    )


def _is_glob(path: str) -> bool:
    return glob.has_magic(path)


def _search_local(path: str, exclude: Sequence[str]) -> _Search:
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return _Search(os.path.dirname(path), {os.path.basename(path): os.path.getsize(path)})
    if os.path.isdir(path):
        return _Search(path, dict(_walk(path, exclude)), is_folder=True)
    if not _is_glob(path):
        raise ConfigError(f"data: no file or folder at {path!r}")
    parts = Path(path).parts
    fixed = next(i for i, part in enumerate(parts) if _is_glob(part))
    root = str(Path(*parts[:fixed])) if fixed else "."
    names = glob.glob(os.path.join(*parts[fixed:]), root_dir=root, recursive=True)
    files = [(name.replace(os.sep, "/"), os.path.join(root, name)) for name in names]
    return _Search(root, {n: os.path.getsize(p) for n, p in files if os.path.isfile(p)})


def _walk(root: str, exclude: Sequence[str]):
    for folder, folders, names in os.walk(root):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and not is_excluded(prefix + f, exclude)
        )
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield prefix + name, os.path.getsize(path)


def _search_remote(url: str) -> _Search:
    fsspec = importlib.import_module("fsspec.core")
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        hint = 'pip install "llm_jax[gcs]"' if url.startswith(("gs:", "gcs:")) else str(error)
        raise ConfigError(f"data: {url!r} needs a package: {hint}") from None
    is_folder = False
    if _is_glob(path):
        found = filesystem.glob(path, detail=True)
        root = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
    elif filesystem.isfile(path):
        found = {path: filesystem.info(path)}
        root = path.rpartition("/")[0]
    else:
        found = filesystem.find(path, detail=True)
        root, is_folder = path.rstrip("/"), True
    sizes = {p: info["size"] for p, info in found.items() if info["type"] == "file"}
    names = {p[len(root) :].lstrip("/"): size for p, size in sizes.items()}
    return _Search(root, names, is_folder, filesystem)


class OpenFiles:
    """Reads pieces of many local files by number, and keeps as many open as the system allows.

    Past half of the limit on open files the rest are opened for each read, rather than one closed
    that another thread may be reading.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._paths = paths
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        self._limit = max(16, _open_files_limit() // 2)

    def pread(self, number: int, length: int, offset: int) -> bytes:
        descriptor = self._open.get(number)
        if descriptor is not None or (descriptor := self._keep(number)) is not None:
            return os.pread(descriptor, length, offset)
        descriptor = os.open(self._paths[number], os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def _keep(self, number: int) -> int | None:
        with self._lock:
            if number not in self._open:
                if len(self._open) >= self._limit:
                    return None
                self._open[number] = os.open(self._paths[number], os.O_RDONLY)
            return self._open[number]

    def __del__(self):
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _open_files_limit() -> int:
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # not a Unix
        return 256
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 16 if soft == resource.RLIM_INFINITY else min(soft, 1 << 16)
