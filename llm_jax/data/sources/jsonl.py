"""JSON lines: one document per line, under `text_key`, or one record; also .gz and .zst.

Lines are found once, by streaming, and their offsets kept in a file of the cache (8 bytes a line,
mapped, not loaded). A compressed file is decompressed into the cache once: .gz and .zst files as
people make them are one long frame, which can only be read from its beginning, and a shuffled walk
reads anywhere. That costs disk (three to five times the compressed size) instead of a decompression
of half the file per document. A file behind a URL is copied there for the same reason.
"""

import dataclasses
import gzip
import hashlib
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm_jax.core.config import ConfigError, nearest
from llm_jax.data.atomic import AtomicFile, NpyWriter
from llm_jax.data.decode import Undecodable, decode, record_of
from llm_jax.data.fields import Record, record_of_values
from llm_jax.data.files import FileSet, OpenFiles, find_files

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson", ".ndjson.gz", ".ndjson.zst")
_CHUNK = 16 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True)
class Config:
    """text_key: the key of the text in each line's object. exclude: as in the text source."""

    path: str
    name: str = "jsonl"
    weight: float = 1.0
    text_key: str = "text"
    exclude: tuple[str, ...] = ()
    undecodable: Undecodable = "replace"


class JsonlSource:
    """Documents by index: files in sorted order, lines in theirs.

    A line that is no JSON object with a string under `text_key` gives an empty text and "malformed":
    whoever walks over the source counts them. A record is the whole object.
    """

    group_starts = None
    split_ids = None

    def __init__(self, config: Config, files: FileSet, cache: Path):
        self._config = config
        self._names = files.names
        cache.mkdir(parents=True, exist_ok=True)
        plain = [_plain_file(files, number, cache) for number in range(len(files))]
        identities = [files.identity(number) for number in range(len(files))]
        self._starts = [
            _line_starts(path, cache / f"{key}.lines.npy")
            for path, key in zip(plain, identities, strict=True)
        ]
        self._files = OpenFiles(plain)
        self._first = np.cumsum([0, *(len(starts) - 1 for starts in self._starts)])
        self.fingerprint = hashlib.blake2b(files.fingerprint.encode(), digest_size=16).hexdigest()
        if not len(self):
            raise ConfigError(f"data: {config.path!r} holds no line")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name, raw = self._line(index)
        record = decode(raw, name, self._config.undecodable)
        if "undecodable" in record and not record["text"]:
            return record
        text = self._text(record["text"])
        if text is None:
            return {"text": "", "name": name, "malformed": True}
        if "undecodable" in record:
            return record | {"text": text}
        return record_of(text, name, self._config.undecodable)

    def record(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name, raw = self._line(index)
        line = decode(raw, name, self._config.undecodable)
        undecodable = line.get("undecodable", 0)
        if undecodable and not line["text"]:
            return Record(name, {}, undecodable=undecodable)
        fields = _parse(line["text"])
        if not isinstance(fields, dict):
            return Record(name, {}, malformed=True, undecodable=undecodable)
        if _SURROGATE.search(line["text"]):
            record = record_of_values(fields, name, self._config.undecodable)
            return dataclasses.replace(record, undecodable=record.undecodable + undecodable)
        return Record(name, fields, undecodable=undecodable)

    def _text(self, line: str) -> str | None:
        fields = _parse(line)
        text = fields.get(self._config.text_key) if isinstance(fields, dict) else None
        return text if isinstance(text, str) else None

    def _line(self, index: int) -> tuple[str, bytes]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        line = index - int(self._first[number])
        start, end = map(int, self._starts[number][line : line + 2])
        return f"{self._names[number]}:{line + 1}", self._files.pread(number, end - start, start)

    def check_text(self) -> None:
        name, raw = self._line(0)
        try:
            first = json.loads(raw.decode("utf-8-sig"))
        except ValueError:
            return
        key = self._config.text_key
        if isinstance(first, dict) and key not in first:
            keys = ", ".join(first)
            raise ConfigError(
                f"data: {name} has no key {key!r}{nearest(key, first)}; its keys: {keys} (set text_key)"
            )


def _parse(line: str) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(line.lstrip("\ufeff"))
    except ValueError:
        return None


def make(config: Config, cache: Path) -> JsonlSource:
    return JsonlSource(config, find_files(config.path, SUFFIXES, config.exclude), cache)


def _plain_file(files: FileSet, number: int, cache: Path) -> Path:
    """Where the lines can be read anywhere: the file itself, or its copy in the cache."""
    name = files.names[number]
    if not files.is_remote and not name.endswith((".gz", ".zst")):
        return Path(files.path(number))
    copy = cache / f"{files.identity(number)}.jsonl"
    if not copy.exists():
        with files.open(number) as packed, AtomicFile(copy) as target:
            stream = _decompressed(packed, name)
            try:
                shutil.copyfileobj(stream, target.file, _CHUNK)
            except Exception as error:  # each codec has a class of its own for a broken file
                raise ConfigError(f"data: {files.path(number)} cannot be read: {error}") from error
    return copy


def _decompressed(packed: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=packed)
    if name.endswith(".zst"):
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError:
            raise ConfigError(
                f'data: {name} needs zstandard: pip install "llm_jax[zstd]"'
            ) from None
        return zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
    return packed


def _line_starts(path: Path, index: Path) -> np.ndarray:
    """[N + 1] int64: where each line that is not blank starts, and the size of the file."""
    if not index.exists():
        with NpyWriter(index, np.int64) as writer, open(path, "rb") as file:
            _find_lines(file, writer)
    return np.load(index, mmap_mode="r", allow_pickle=False)


def _find_lines(file: BinaryIO, writer: NpyWriter) -> None:
    offset, start = 0, 0
    while block := file.read(_CHUNK):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (offset + 1)
        starts = np.concatenate([[start], ends[:-1]]) if len(ends) else ends
        writer.append(starts[ends - starts > 2])  # shorter than "{}" and a newline: blank
        start = int(ends[-1]) if len(ends) else start
        offset += len(block)
    if offset - start >= 2:
        writer.append(np.array([start]))
    writer.append(np.array([offset]))
