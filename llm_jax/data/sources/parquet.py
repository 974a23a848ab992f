"""Parquet files: one document per row, in the column `text_key` (extra `parquet`).

A row can only be read with its whole row group, so the source says where its groups start
(`group_starts`), the shuffled walk keeps a group's rows together, and the last few groups that were
read stay in memory.
"""

import collections
import dataclasses
import hashlib
import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, nearest
from llm_jax.data.decode import Undecodable, decode, record_of
from llm_jax.data.files import FileSet, find_files

SUFFIXES = (".parquet", ".pq")
_GROUPS_KEPT = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """text_key: the column of the text, strings or UTF-8 bytes."""

    path: str
    name: str = "parquet"
    weight: float = 1.0
    text_key: str = "text"
    exclude: tuple[str, ...] = ()
    undecodable: Undecodable = "replace"


class ParquetSource:
    """Documents by index: files in sorted order, rows in theirs."""

    def __init__(self, config: Config, files: FileSet):
        self._config, self._files = config, files
        self._groups: list[tuple[int, int]] = []
        sizes = []
        for number in range(len(files)):
            with files.open(number) as file:
                metadata = self._open(number, file).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self.group_starts = np.cumsum([0, *sizes])
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        key = f"{files.fingerprint} {len(self)}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if not len(self):
            raise ConfigError(f"data: {config.path!r} holds no row")

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self.group_starts, index, side="right")) - 1
        row = index - int(self.group_starts[group])
        value = self._column(group)[row].as_py()
        name = f"{self._files.names[self._groups[group][0]]}:{index}"
        if value is None:
            return {"text": "", "name": name, "malformed": True}
        if isinstance(value, bytes):
            return decode(value, name, self._config.undecodable)
        return record_of(value, name, self._config.undecodable)

    def _open(self, number: int, file: Any) -> Any:
        """A ParquetFile whose text column is there and holds text."""
        arrow, parquet = _pyarrow()
        path, key = self._files.path(number), self._config.text_key
        try:
            opened = parquet.ParquetFile(file)
        except (arrow.ArrowInvalid, OSError) as error:
            raise ConfigError(f"data: {path} cannot be read: {error}") from None
        schema = opened.schema_arrow
        if key not in schema.names:
            raise ConfigError(
                f"data: {path} has no column {key!r}{nearest(key, schema.names)}; its columns: "
                f"{', '.join(schema.names)} (set text_key)"
            )
        kind = schema.field(key).type
        texts = (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary())
        if kind not in texts:
            raise ConfigError(f"data: {path}: column {key!r} is {kind}: expected string or binary")
        return opened

    def _column(self, group: int) -> Any:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            number, inside = self._groups[group]
            with self._files.open(number) as file:
                table = self._open(number, file).read_row_group(inside, [self._config.text_key])
            self._kept[group] = table.column(0)
            if len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
            return self._kept[group]


def make(config: Config, cache: Path) -> ParquetSource:
    _pyarrow()
    return ParquetSource(config, find_files(config.path, SUFFIXES, config.exclude))


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            'a parquet source needs pyarrow: pip install "llm_jax[parquet]"'
        ) from None
