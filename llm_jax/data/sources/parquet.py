"""Parquet files: one document per row, in the column `text_key`, or one record (extra `parquet`).

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
from llm_jax.data.fields import Record, record_of_values
from llm_jax.data.files import FileSet, find_files

SUFFIXES = (".parquet", ".pq")
_GROUPS_KEPT = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """text_key: the column of the text, strings or UTF-8 bytes.

    columns: the fields of a record; None for all.
    """

    path: str
    name: str = "parquet"
    weight: float = 1.0
    text_key: str = "text"
    exclude: tuple[str, ...] = ()
    undecodable: Undecodable = "replace"
    columns: tuple[str, ...] | None = None


class ParquetSource:
    """Documents by index: files in sorted order, rows in theirs."""

    split_ids = None

    def __init__(self, config: Config, files: FileSet):
        self._config, self._files = config, files
        self._groups: list[tuple[int, int]] = []
        self._schemas = []
        sizes = []
        for number in range(len(files)):
            with files.open(number) as file:
                opened = self._open(number, file)
                metadata = opened.metadata
                self._schemas.append(opened.schema_arrow)
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self.group_starts = np.cumsum([0, *sizes])
        self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        key = f"{files.fingerprint} {len(self)}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if not len(self):
            raise ConfigError(f"data: {config.path!r} holds no row")
        for number in range(len(files)):
            for column in config.columns or ():
                self._check_column(number, column, "columns")

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    def __getitem__(self, index: int) -> dict:
        (value,), name = self._row(index, (self._config.text_key,))
        if value is None:
            return {"text": "", "name": name, "malformed": True}
        if isinstance(value, bytes):
            return decode(value, name, self._config.undecodable)
        return record_of(value, name, self._config.undecodable)

    def record(self, index: int) -> Record:
        """A null is a field with None."""
        group = int(np.searchsorted(self.group_starts, index, side="right")) - 1
        columns = self._config.columns or tuple(self._schemas[self._groups[group][0]].names)
        values, name = self._row(index, columns)
        fields = dict(zip(columns, values, strict=True))
        return record_of_values(fields, name, self._config.undecodable)

    def check_text(self) -> None:
        arrow, _ = _pyarrow()
        key = self._config.text_key
        texts = (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary())
        for number, schema in enumerate(self._schemas):
            self._check_column(number, key, "text_key")
            kind = schema.field(key).type
            if kind not in texts:
                path = self._files.path(number)
                raise ConfigError(
                    f"data: {path}: column {key!r} is {kind}: expected string or binary"
                )

    def _check_column(self, number: int, column: str, setting: str) -> None:
        names = self._schemas[number].names
        if column not in names:
            raise ConfigError(
                f"data: {self._files.path(number)} has no column {column!r}{nearest(column, names)}; "
                f"its columns: {', '.join(names)} (set {setting})"
            )

    def _row(self, index: int, columns: tuple[str, ...]) -> tuple[list, str]:
        """The values of one row and its name."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self.group_starts, index, side="right")) - 1
        row = index - int(self.group_starts[group])
        values = [column[row].as_py() for column in self._columns(group, columns)]
        return values, f"{self._files.names[self._groups[group][0]]}:{index}"

    def _columns(self, group: int, columns: tuple[str, ...]) -> list[Any]:
        key = group, columns
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            number, inside = self._groups[group]
            with self._files.open(number) as file:
                table = self._open(number, file).read_row_group(inside, list(columns))
            self._kept[key] = [table.column(name) for name in columns]
            if len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _open(self, number: int, file: Any) -> Any:
        arrow, parquet = _pyarrow()
        try:
            return parquet.ParquetFile(file)
        except (arrow.ArrowInvalid, OSError) as error:
            path = self._files.path(number)
            raise ConfigError(f"data: {path} cannot be read: {error}") from None


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
