"""Records of sources by their numbers in the run, for objectives that make their examples themselves.

Whether a record is held out depends on what is in it, as with documents, so it takes reading all of
them once to know how many are left to train on. The indices on either side are kept, and batch n is
arithmetic on n again:

    <shards>/<source key>/records/train.npy        int64, ascending
    <shards>/<source key>/records/held_out.npy
    <shards>/<source key>/records/index.json       written last
"""

import collections
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.atomic import NpyWriter, write_json
from llm_jax.data.config import DataConfig, shards_folder
from llm_jax.data.documents import COUNTS, check_malformed
from llm_jax.data.draw import Draw, EndlessDraw, OrderedDraw
from llm_jax.data.fields import Record, canonical
from llm_jax.data.progress import Progress
from llm_jax.data.shuffle import EndlessOrder, GroupedOrder
from llm_jax.data.sources import DocumentSource, open_source, source_key
from llm_jax.data.split import is_held_out

FORMAT = 1
SPLITS = ("train", "held_out")
_BATCH = 4096
_PADDING = Record("", {})


@dataclasses.dataclass(frozen=True)
class RecordPlan:
    """All that a split depends on. source: the source's fingerprint; records: how many it has."""

    source: str
    records: int
    held_out_threshold: int
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """index.json of one source's records.

    Attributes:
      path: of the source, for messages.
      sizes: by split, how many records; those that cannot be read are in neither.
      counts: what was wrong with them, by the names in `documents.COUNTS`.
    """

    folder: Path
    path: str
    plan: RecordPlan
    sizes: dict[str, int]
    counts: dict[str, int]

    def save(self) -> None:
        value = dataclasses.asdict(self)
        del value["folder"]
        write_json(self.folder / "index.json", value)

    @staticmethod
    def load(folder: Path) -> "RecordIndex | None":
        """None where the split has not been made."""
        file = folder / "index.json"
        if not file.exists():
            return None
        try:
            value = json.loads(file.read_text())
            return RecordIndex(folder=folder, **value | {"plan": RecordPlan(**value["plan"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{file} is no index of records ({error}): delete {folder}") from None

    def indices(self, split: str) -> np.ndarray:
        """[N] int64, ascending; mapped, not loaded."""
        return np.load(self.folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)

    def order(self, source: DocumentSource, seed: int, key: str) -> EndlessOrder:
        """In which training walks over the places in `indices("train")`."""
        name = f"{key} records"
        if source.group_starts is not None:
            return GroupedOrder(
                np.searchsorted(self.indices("train"), source.group_starts), seed, name
            )
        return EndlessOrder(self.sizes["train"], seed, name)


class RecordReader:
    """Reads records of one source by index and counts what was wrong with them.

    Attributes:
      counts: of all records read so far, by the names in `documents.COUNTS`.
    """

    def __init__(self, source: DocumentSource):
        self._source = source
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTS, 0))

    def __call__(self, index: int) -> Record | None:
        """None where there is none: without a field, or unreadable."""
        record = self._source.record(index)
        self.counts["documents"] += 1
        if record.undecodable:
            self.counts["undecodable_documents"] += 1
            self.counts["undecodable_bytes"] += record.undecodable
        if record.malformed:
            self.counts["malformed"] += 1
            return None
        if not record.fields:
            self.counts["empty"] += 1
            return None
        return record

    def sound(self, index: int) -> Record:
        """A record that there was when they were split.

        Raises:
          ConfigError: there no longer is.
        """
        record = self(index)
        if record is None:
            raise ConfigError(
                f"data: record {self._source.record(index).name} could be read when the records were "
                "split and cannot be read now: delete the folder `records` of its source"
            )
        return record


class RecordBatches:
    """Records of a split by their numbers in the run.

    Attributes:
      num_rows: None where there is no end.
    """

    def __init__(
        self,
        sources: list[DocumentSource],
        indices: list[RecordIndex],
        split: str,
        draw: Draw,
        num_rows: int | None = None,
    ):
        self._readers = [RecordReader(source) for source in sources]
        self._indices = [index.indices(split) for index in indices]
        self._draw = draw
        self.num_rows, self.epochs = num_rows, draw.epochs

    def records(self, numbers: np.ndarray) -> list[Record]:
        """Records `numbers` [B] int64 of the run; past the end without a name or a field."""
        which, items = self._draw(numbers)
        found = [_PADDING] * len(numbers)
        for source, (reader, indices) in enumerate(zip(self._readers, self._indices, strict=True)):
            places = np.flatnonzero(which == source)
            chosen = indices[items[places]]
            for place, index in zip(places.tolist(), chosen.tolist(), strict=True):
                found[place] = reader.sound(index)
        return found


def example_of(record: Record) -> dict[str, Any]:
    """What an objective sees: the fields, and the record's name where no field is called so."""
    return {"name": record.name, **record.fields} if record.fields else {}


def prepared_records(
    data: DataConfig, workdir: Path
) -> tuple[list[DocumentSource], list[RecordIndex]]:
    """The sources of a run and their splits.

    Raises:
      ConfigError: `prepare` has not been here, or a source has changed since.
    """
    folder = shards_folder(data, workdir)
    sources, indices = [], []
    for config in data.sources:
        place = folder / source_key(config) / "records"
        index = RecordIndex.load(place)
        if index is None:
            raise ConfigError(
                f"data: {config.path!r} has no records in {place}: run llm_jax.prepare first"
            )
        source = open_source(config, folder / "cache", as_records=True)
        if source.fingerprint != index.plan.source:
            raise ConfigError(f"data: {config.path!r} changed since {place} was made")
        sources.append(source)
        indices.append(index)
    return sources, indices


def open_train_records(
    data: DataConfig, sources: list[DocumentSource], indices: list[RecordIndex]
) -> RecordBatches:
    """Raises ConfigError if a source with a weight has no record to train on."""
    orders = [
        index.order(source, data.shuffle_seed, source_key(config))
        for index, source, config in zip(indices, sources, data.sources, strict=True)
    ]
    weights = [config.weight for config in data.sources]
    for index, weight in zip(indices, weights, strict=True):
        if weight > 0 and not index.sizes["train"]:
            raise ConfigError(
                f"data: {index.path!r} has no record to train on ({index.sizes['held_out']} held "
                "out): add records or lower data.held_out_fraction"
            )
    draw = EndlessDraw(weights, orders, data.shuffle_seed)
    return RecordBatches(sources, indices, "train", draw)


def open_held_out_records(
    sources: list[DocumentSource], indices: list[RecordIndex]
) -> RecordBatches:
    """Raises ConfigError if nothing is held out."""
    draw = OrderedDraw([index.sizes["held_out"] for index in indices])
    if not len(draw):
        total = sum(index.plan.records for index in indices)
        raise ConfigError(
            f"data: none of {total} records is held out: raise data.held_out_fraction to evaluate"
        )
    return RecordBatches(sources, indices, "held_out", draw, len(draw))


def split_records(
    source: DocumentSource,
    path: str,
    plan: RecordPlan,
    folder: Path,
    malformed_most: float,
    progress: Progress,
) -> RecordIndex:
    """Reads every record once and writes which are held out.

    Raises:
      ConfigError: more than the share `malformed_most` of the records cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splitter = _by_ids if source.split_ids is not None else _by_contents
    reader = RecordReader(source)
    train, held_out = (NpyWriter(folder / f"{split}.npy", np.int64) for split in SPLITS)
    progress.start(f"splitting {path}", plan.records)
    with train, held_out, contextlib.ExitStack() as stack:
        stack.callback(progress.finish)
        for start in range(0, plan.records, _BATCH):
            indices = np.arange(start, min(start + _BATCH, plan.records))
            kept, is_out = splitter(source, reader, indices, plan.held_out_threshold)
            train.append(kept[~is_out])
            held_out.append(kept[is_out])
            check_malformed(reader.counts, plan.records, malformed_most, path)
            progress.advance(len(indices))
    sizes = {"train": train.length, "held_out": held_out.length}
    index = RecordIndex(folder, path, plan, sizes, dict(reader.counts))
    index.save()
    return index


def _by_contents(
    source: DocumentSource, reader: RecordReader, indices: np.ndarray, threshold: int
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of records, [N] int64, and whether each is held out, [N] bool."""
    records = ((index, reader(index)) for index in indices.tolist())
    found = [
        (index, is_held_out(canonical(record.fields), threshold))
        for index, record in records
        if record is not None
    ]
    return (
        np.array([index for index, _ in found], np.int64),
        np.array([is_out for _, is_out in found], bool),
    )


def _by_ids(
    source: DocumentSource, reader: RecordReader, indices: np.ndarray, threshold: int
) -> tuple[np.ndarray, np.ndarray]:
    reader.counts["documents"] += len(indices)
    ids = source.split_ids(indices).tolist()
    return indices, np.array([is_held_out(str(i).encode(), threshold) for i in ids], bool)
