"""From a prepared corpus to batches: `make_loader`.

Batch n is a pure function of the config and n (and, in mode "stream", of the slots' cursors), global
over all processes: process p of P takes rows p * B/P .. (p + 1) * B/P. A Grain dataset whose element
is a whole batch does the reading ahead, so Grain's cost is paid once a batch, and the objective's
transforms are applied to whole batches.
"""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import ExampleObjective, Objective, Tokenizer
from llm_jax.data.config import DataConfig, resolve_data, shards_folder
from llm_jax.data.documents import DocumentReader, document_order, problems, source_threshold
from llm_jax.data.records import (
    RecordBatches,
    example_of,
    open_held_out_records,
    open_train_records,
    prepared_records,
)
from llm_jax.data.rows import Batches, RowShape, open_held_out, open_train
from llm_jax.data.shards import ShardIndex
from llm_jax.data.sources import open_source, source_key
from llm_jax.data.stream import (
    DocumentStream,
    HeldOutStream,
    StreamSource,
    TrainStream,
)
from llm_jax.data.tokenizers import fingerprint

__all__ = ["DataConfig", "Loader", "make_loader", "merge_states", "resolve_data"]

Split = Literal["train", "held_out"]
_ENDLESS = 1 << 40


class Loader:
    """Batches of this process, in order; "train" is endless, "held_out" ends.

    Attributes:
      num_batches: None where it is endless or not known before it is read.
      close: stops reading ahead; called without arguments.
    """

    def __init__(self, dataset: grain.IterDataset, rows: "_Rows", share: int, num_shares: int):
        self._opened = [iter(dataset)]
        self._rows, self._share, self._num_shares = rows, share, num_shares
        self.num_batches = rows.num_batches
        # At exit as well: later, Grain's own __del__ would miss modules that are already gone.
        self.close = weakref.finalize(self, _close, self._opened)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._opened:
            raise ValueError("this loader is closed")
        return self._opened[0]

    def __next__(self) -> dict[str, np.ndarray]:
        """What the objective makes of rows or records: batch_size / process_count is first everywhere."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """JSON-able, valid for any process count; where there are several, all must call this."""
        state = self.local_state()
        if self._num_shares == 1 or "documents" not in state:
            return state
        from jax.experimental import multihost_utils

        # int32: JAX would silently drop the upper half of int64.
        cursors = np.array([state["documents"], state["offsets"]], np.int32)
        # Shares follow the mesh, not the processes, and several processes may have the same one.
        shares, gathered = multihost_utils.process_allgather((np.int32(self._share), cursors))
        of_share = dict(zip(shares.tolist(), gathered, strict=True))
        states = [
            {"batch": state["batch"], "documents": d.tolist(), "offsets": o.tolist()}
            for d, o in (of_share[i] for i in range(self._num_shares))
        ]
        return merge_states(states)

    def local_state(self) -> dict[str, Any]:
        """This process's part of the state, for `merge_states`."""
        state = self._iterator.get_state()
        return {"batch": state["next_index"]} if "next_index" in state else state

    def set_state(self, state: dict[str, Any]) -> None:
        """The next batch is the one that would have come after `state` was got.

        Raises:
          ConfigError: the state is of another mode or batch size.
        """
        self._iterator.set_state(self._rows.local_part(state))

    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through, by source key (here: by local slots)."""
        return self._rows.epochs(self.local_state())

    def problems(self) -> list[str]:
        """What was wrong with documents or records, one sentence each; see also `prepare`."""
        return self._rows.problems()


def make_loader(
    data: DataConfig,
    *,
    workdir: Path,
    tokenizer: Tokenizer,
    objective: Objective | ExampleObjective,
    batch_size: int,
    split: Split = "train",
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """The batches of a run whose data `prepare(data, workdir, examples=objective.examples)` has made.

    Args:
      batch_size: rows of the global batch.
      split: "train" is endless and shuffled; "held_out" is finite and in order, its last batch padded.

    Raises:
      ConfigError: batch_size does not divide among the processes; the data is not prepared, or was
        with another tokenizer; an objective with partner rows in mode "stream".
    """
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch_size = {batch_size}: expected a positive multiple of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index = {process_index}: expected 0..{process_count - 1}")
    local = batch_size // process_count
    slots = range(process_index * local, (process_index + 1) * local)
    workdir = Path(workdir)
    if objective.examples:
        per_row = objective.examples_per_row
        records = range(slots.start * per_row, slots.stop * per_row)
        rows = _RecordRows(data, workdir, batch_size * per_row, records, split)
        dataset = rows.dataset(objective.transforms(tokenizer, data.sequence_length))
        return Loader(dataset, rows, process_index, process_count)
    length = objective.row_length(data.sequence_length)
    shape = RowShape.of(data.sequence_length, length)
    arguments = (data, workdir, tokenizer, batch_size, slots, split, shape)
    if data.mode == "shards":
        rows = _ShardedRows(*arguments, objective.partner_rows)
    elif objective.partner_rows:
        raise ConfigError(
            "data.mode = 'stream': this objective takes sentences from two places of the corpus at "
            "once and needs data.mode = 'shards'"
        )
    else:
        rows = _StreamedRows(*arguments)
    return Loader(rows.dataset(objective.transforms(tokenizer)), rows, process_index, process_count)


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's state from the `Loader.local_state()` of every share, in the shares' order."""
    merged = {"batch": states[0]["batch"]}
    for key in ("documents", "offsets"):
        if key in states[0]:
            merged[key] = [value for state in states for value in state[key]]
    return merged


def _close(opened: list[grain.DatasetIterator]) -> None:
    while opened:
        opened.pop().close()


class _Rows:
    """How rows or records come about, and what the state means."""

    num_batches: int | None = None

    def dataset(self, transforms: list) -> grain.IterDataset:
        raise NotImplementedError

    def local_part(self, state: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def epochs(self, state: dict[str, Any]) -> dict[str, float]:
        raise NotImplementedError

    def problems(self) -> list[str]:
        raise NotImplementedError


class _NumberedRows(_Rows):
    """Rows by their numbers in the run: the state is the number of the next batch."""

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        slots: range,
        batches: Batches | RecordBatches,
        keys: list[str],
    ):
        self._data, self._batch_size, self._slots = data, batch_size, slots
        self._batches, self._keys = batches, keys
        if batches.num_rows is not None:
            self.num_batches = -(-batches.num_rows // batch_size)

    def dataset(self, transforms: list) -> grain.IterDataset:
        count = _ENDLESS if self.num_batches is None else self.num_batches
        dataset = grain.MapDataset.range(count).map(self._batch).apply(transforms)
        options = grain.ReadOptions(
            num_threads=self._data.num_threads,
            prefetch_buffer_size=self._data.prefetch_batches if self._data.num_threads else 0,
        )
        return dataset.to_iter_dataset(options)

    def _batch(self, batch: int) -> dict[str, Any]:
        first = batch * self._batch_size
        numbers = np.arange(first + self._slots.start, first + self._slots.stop, dtype=np.int64)
        return {**self._read(numbers), "row_ids": numbers}

    def _read(self, numbers: np.ndarray) -> dict[str, Any]:
        raise NotImplementedError

    def local_part(self, state: dict[str, Any]) -> dict[str, Any]:
        if state.keys() != {"batch"}:
            raise ConfigError("the loader's state is of data.mode = 'stream', not 'shards'")
        return {"next_index": state["batch"]}

    def epochs(self, state: dict[str, Any]) -> dict[str, float]:
        done = self._batches.epochs(state["batch"] * self._batch_size)
        return dict(zip(self._keys, done, strict=True))


class _ShardedRows(_NumberedRows):
    def __init__(
        self,
        data: DataConfig,
        workdir: Path,
        tokenizer: Tokenizer,
        batch_size: int,
        slots: range,
        split: Split,
        shape: RowShape,
        partner_rows: bool,
    ):
        folder = shards_folder(data, workdir)
        self._indices = [_finished_index(folder, source, tokenizer) for source in data.sources]
        self._partner_rows = partner_rows
        if split == "train":
            weights = [source.weight for source in data.sources]
            batches = open_train(self._indices, weights, data.shuffle_seed, shape)
        else:
            batches = open_held_out(self._indices, shape)
        keys = [index.folder.name for index in self._indices]
        super().__init__(data, batch_size, slots, batches, keys)

    def _read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        rows = {"rows": self._batches.rows(numbers)}
        if self._partner_rows:
            rows["partners"] = self._batches.partners(numbers)
        return rows

    def problems(self) -> list[str]:
        return [
            f"{index.source['path']}: {line}"
            for index in self._indices
            for line in problems(index.counts)
        ]


class _RecordRows(_NumberedRows):
    def __init__(
        self, data: DataConfig, workdir: Path, batch_size: int, slots: range, split: Split
    ):
        sources, self._indices = prepared_records(data, workdir)
        if split == "train":
            batches = open_train_records(data, sources, self._indices)
        else:
            batches = open_held_out_records(sources, self._indices)
        super().__init__(data, batch_size, slots, batches, list(map(source_key, data.sources)))

    def _read(self, numbers: np.ndarray) -> dict[str, list]:
        found = self._batches.records(numbers)
        return {
            "examples": [example_of(record) for record in found],
            "names": [record.name for record in found],
        }

    def problems(self) -> list[str]:
        return [
            f"{index.path}: {line}" for index in self._indices for line in problems(index.counts)
        ]


class _StreamedRows(_Rows):
    def __init__(
        self,
        data: DataConfig,
        workdir: Path,
        tokenizer: Tokenizer,
        batch_size: int,
        slots: range,
        split: Split,
        shape: RowShape,
    ):
        self._data, self._batch_size, self._slots, self._split = data, batch_size, slots, split
        cache = shards_folder(data, workdir) / "cache"
        self._sources = [_stream_source(data, config, cache) for config in data.sources]
        if split == "train":
            self._documents = DocumentStream(
                self._sources, tokenizer, data.shuffle_seed, data.malformed_fraction_max
            )
            self._stream = TrainStream(self._documents, batch_size, slots, shape)
        else:
            self._stream = HeldOutStream(self._sources, tokenizer, batch_size, slots, shape)

    def dataset(self, transforms: list) -> grain.IterDataset:
        ahead = self._data.prefetch_batches if self._data.num_threads else 0
        return grain.experimental.ThreadPrefetchIterDataset(
            self._stream.apply(transforms), prefetch_buffer_size=ahead
        )

    def local_part(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._split == "held_out":
            return {"batch": state["batch"]}
        if "documents" not in state:
            raise ConfigError("the loader's state is of data.mode = 'shards', not 'stream'")
        if len(state["documents"]) != self._batch_size:
            raise ConfigError(
                f"batch_size = {self._batch_size}: a stream resumes only with the batch size it was "
                f"saved with, {len(state['documents'])}"
            )
        part = slice(self._slots.start, self._slots.stop)
        return {key: v if key == "batch" else v[part] for key, v in state.items()}

    def epochs(self, state: dict[str, Any]) -> dict[str, float]:
        if self._split == "held_out":
            done = [0.0] * len(self._sources)
        else:
            done = self._documents.epochs(int(np.mean(state["documents"]) * self._batch_size))
        keys = map(source_key, self._data.sources)
        return dict(zip(keys, done, strict=True))

    def problems(self) -> list[str]:
        return [
            f"{source.path}: {line}"
            for source in self._sources
            for line in problems(source.reader.counts)
        ]


def _stream_source(data: DataConfig, config: Any, cache: Path) -> StreamSource:
    source = open_source(config, cache)
    return StreamSource(
        path=config.path,
        size=len(source),
        weight=config.weight,
        order=document_order(source, config, data.shuffle_seed),
        reader=DocumentReader(source, source_threshold(data, source)),
    )


def _finished_index(folder: Path, source: Any, tokenizer: Tokenizer) -> ShardIndex:
    place = folder / source_key(source)
    index = ShardIndex.load(place)
    if index is None or not index.complete:
        raise ConfigError(
            f"data: {source.path!r} has no finished shards in {place}: run llm_jax.prepare first"
        )
    if index.plan.tokenizer != fingerprint(tokenizer):
        raise ConfigError(
            f"the shards in {place} were made with tokenizer {index.plan.tokenizer[:12]}, this one is "
            f"{fingerprint(tokenizer)[:12]}: use the one in {folder / 'tokenizer'} or prepare again"
        )
    return index
