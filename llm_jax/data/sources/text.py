"""Plain text and code: one document per file; a big file is cut at line borders.

`path="python:stdlib"` is the standard library of the running interpreter without its tests: about
12 MB of code that every machine has.
"""

import dataclasses
import functools
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.decode import Undecodable, decode
from llm_jax.data.fields import Record
from llm_jax.data.files import FileSet, find_files

STDLIB = "python:stdlib"
_STDLIB_EXCLUDE = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".log"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh"),
)
_CUT_BYTES = 1 << 20
_CUT_BYTES_LEAST = 8 << 10
_FEW_FILES = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """A folder, file, glob or URL of text.

    Attributes:
      suffixes: what a file in a folder must end in; a file or glob is taken as it is.
      exclude: globs; one without a slash is compared with every part of the relative path.
      document_bytes: a longer file becomes several documents, cut at line borders. None: 1 MiB, or
        less (1/256 of the corpus, 8 KiB at least) where a corpus of under 64 files would otherwise
        have too few documents to shuffle and to hold some out.
      undecodable: what becomes of bytes that are no UTF-8 (see data/decode.py).
    """

    path: str
    name: str = "text"
    weight: float = 1.0
    suffixes: tuple[str, ...] = _SUFFIXES
    exclude: tuple[str, ...] = ()
    document_bytes: int | None = None
    undecodable: Undecodable = "replace"

    def __post_init__(self):
        if self.document_bytes is not None and self.document_bytes < 1:
            raise ConfigError(f"document_bytes = {self.document_bytes}: expected at least 1")


class TextSource:
    """Documents by index: files in sorted order, each cut where it is longer than the limit.

    Attributes:
      fingerprint: of the files' names and sizes and of where they are cut.
      group_starts: None, any document is read alone.
    """

    group_starts = None
    split_ids = None

    def __init__(self, config: Config, files: FileSet):
        self._policy = config.undecodable
        self._files = files
        total = int(files.sizes.sum())
        limit = config.document_bytes or _cut_bytes(total, len(files))
        # A file's documents are starts[first[f]] .. starts[first[f + 1]].
        cuts = [_cut(files, number, limit) for number in range(len(files))]
        self._first = np.cumsum([0, *map(len, cuts)])
        self._starts = np.concatenate(cuts) if cuts else np.zeros(0, np.int64)
        key = f"{files.fingerprint} {limit}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if total == 0:
            raise ConfigError(f"data: {config.path!r}: all its {len(files)} files are empty")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        start = int(self._starts[index])
        is_last = index + 1 == self._first[number + 1]
        end = None if is_last else int(self._starts[index + 1])
        name = self._files.names[number]
        raw = self._files.read(number, start, end)
        is_whole = start == 0 and is_last
        head = (
            functools.partial(self._files.read, number, 0, 4096) if name.endswith(".py") else None
        )
        return decode(raw, name if is_whole else f"{name}@{start}", self._policy, head)

    def record(self, index: int) -> Record:
        """The only field is "text"."""
        document = self[index]
        fields = {"text": document["text"]} if document["text"] else {}
        return Record(document["name"], fields, undecodable=document.get("undecodable", 0))

    def check_text(self) -> None: ...


def make(config: Config, cache: Path) -> TextSource:
    if config.path == STDLIB:
        files = find_files(sysconfig.get_paths()["stdlib"], (".py",), _STDLIB_EXCLUDE)
    else:
        files = find_files(config.path, config.suffixes, config.exclude)
    return TextSource(config, files)


def _cut_bytes(total: int, files: int) -> int:
    if files >= _FEW_FILES:
        return _CUT_BYTES
    return min(max(total // 256, _CUT_BYTES_LEAST), _CUT_BYTES)


def _cut(files: FileSet, number: int, limit: int) -> np.ndarray:
    """Where the documents of one file start: [N] int64. Only the surroundings of a cut are read."""
    size = int(files.sizes[number])
    starts = [0]
    if size > limit:
        with files.open(number) as file:
            while size - starts[-1] > limit:
                border = _border(file, starts[-1] + limit, limit)
                if border >= size:
                    break
                starts.append(border)
    return np.array(starts, np.int64)


def _border(file, position: int, limit: int) -> int:
    """The start of the first line at or after `position`; a line over `limit` is cut in itself."""
    file.seek(position - 1)
    block = file.read(min(limit, 1 << 16))
    newline = block.find(b"\n")
    offset = position - 1
    while newline < 0 and block and offset + len(block) < position + limit:
        offset += len(block)
        block = file.read(min(limit, 1 << 16))
        newline = block.find(b"\n")
    if newline >= 0:
        return offset + newline + 1
    if not block:
        return offset
    place = len(block) - 1
    while place > 0 and block[place] & 0xC0 == 0x80:  # not between the bytes of one character
        place -= 1
    return offset + place
