"""Rows tokenized while training: no shards, resumed exactly.

The documents of the run form one endless numbered sequence, by the same arithmetic as rows of shards
(mixture, then a new shuffled order per epoch). Slot b of a batch of B reads documents b, b + B,
b + 2B, ... one after the other, so its next row depends on nothing but the slot's cursor: which of
its documents, and how many tokens into it. A process advances only its own slots, and the state of
the run is all B cursors.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Tokenizer
from llm_jax.data.documents import (
    DocumentReader,
    batched_by_size,
    check_malformed,
    tokenize_documents,
)
from llm_jax.data.mix import Mixture, in_order
from llm_jax.data.rows import RowShape
from llm_jax.data.shuffle import EndlessOrder

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """One source of a stream; `size` is its number of indices."""

    path: str
    size: int
    weight: float
    order: EndlessOrder
    reader: DocumentReader


class DocumentStream:
    """The run's endless sequence of training documents, by number."""

    def __init__(
        self, sources: list[StreamSource], tokenizer: Tokenizer, seed: int, malformed_most: float
    ):
        self._sources, self._tokenizer = sources, tokenizer
        self._malformed_most = malformed_most
        self._mixture = Mixture([source.weight for source in sources], seed)
        self.sizes = np.array([source.size for source in sources])

    def tokens(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The tokens of documents `numbers` [N]; empty where one is held out or no document."""
        which, turns = self._mixture(numbers)
        items = in_order(which, turns, [source.order for source in self._sources])
        texts, kept = [], []
        for place, (number, item) in enumerate(zip(which.tolist(), items.tolist(), strict=True)):
            document = self._sources[number].reader(item)
            if document is not None and not document.is_held_out:
                texts.append(document.text)
                kept.append(place)
        result = [np.zeros(0, np.uint16)] * len(numbers)
        for place, tokens in zip(kept, tokenize_documents(self._tokenizer, texts), strict=True):
            result[place] = tokens
        for source in self._sources:
            check_malformed(source.reader.counts, source.size, self._malformed_most, source.path)
        return result

    def epochs(self, documents_done: int) -> list[float]:
        return (self._mixture.taken(documents_done) / self.sizes).tolist()


class TrainStream(grain.IterDataset):
    """Batches of the slots `slots` of a global batch of `batch_size`, endless."""

    def __init__(self, documents: DocumentStream, batch_size: int, slots: range, shape: RowShape):
        super().__init__()
        self.documents, self.batch_size, self.slots, self.shape = (
            documents,
            batch_size,
            slots,
            shape,
        )

    def __iter__(self) -> "TrainStreamIterator":
        return TrainStreamIterator(self)


class TrainStreamIterator(grain.DatasetIterator):
    """State: {"batch": n, "documents": [b], "offsets": [b]}, of this process's slots."""

    def __init__(self, stream: TrainStream):
        super().__init__()
        self._stream = stream
        zeros = [0] * len(stream.slots)
        self.set_state({"batch": 0, "documents": zeros, "offsets": zeros})

    def get_state(self) -> dict[str, Any]:
        return {
            "batch": self._batch,
            "documents": self._documents.tolist(),
            "offsets": self._offsets.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._batch = state["batch"]
        self._documents = np.array(state["documents"], np.int64)
        self._offsets = np.array(state["offsets"], np.int64)
        # Tokens of documents from self._documents[b] on; what is before the cursor is kept with them.
        self._buffers = [collections.deque() for _ in self._stream.slots]
        self._have = -self._offsets

    def __next__(self) -> dict[str, np.ndarray]:
        stream = self._stream
        self._fill()
        rows = np.empty((len(stream.slots), stream.shape.length), np.int32)
        for slot, buffer in enumerate(self._buffers):
            _take(buffer, int(self._offsets[slot]), rows[slot])
            self._advance(slot)
        first = self._batch * stream.batch_size + stream.slots.start
        self._batch += 1
        return {"rows": rows, "row_ids": np.arange(first, first + len(rows), dtype=np.int64)}

    def _fill(self) -> None:
        """Reads until every slot has a row's tokens; all slots' documents are tokenized together."""
        stream, length = self._stream, self._stream.shape.length
        barren = 0
        while len(needy := np.flatnonzero(self._have < length)):
            ahead = np.array([len(self._buffers[slot]) for slot in needy])
            ordinals = self._documents[needy] + ahead
            numbers = ordinals * stream.batch_size + stream.slots.start + needy
            found = stream.documents.tokens(numbers)
            for slot, tokens in zip(needy.tolist(), found, strict=True):
                self._buffers[slot].append(tokens)
                self._have[slot] += len(tokens)
            barren = 0 if any(map(len, found)) else barren + len(found)
            if barren > 4 * stream.documents.sizes.sum() + 4096:
                raise ConfigError("data: the sources hold no document to train on")

    def _advance(self, slot: int) -> None:
        buffer, stride = self._buffers[slot], self._stream.shape.stride
        self._have[slot] -= stride
        offset = int(self._offsets[slot]) + stride
        while buffer and offset >= len(buffer[0]):
            offset -= len(buffer.popleft())
            self._documents[slot] += 1
        self._offsets[slot] = offset


class HeldOutStream(grain.IterDataset):
    """The held-out documents of all sources in order, packed into rows; finite.

    Finding them reads every document of the sources. State: {"batch": n}.
    """

    def __init__(
        self,
        sources: list[StreamSource],
        tokenizer: Tokenizer,
        batch_size: int,
        slots: range,
        shape: RowShape,
    ):
        super().__init__()
        self._sources, self._tokenizer = sources, tokenizer
        self.batch_size, self.slots, self._shape = batch_size, slots, shape

    def __iter__(self) -> "HeldOutStreamIterator":
        return HeldOutStreamIterator(self)

    def batches(self) -> Iterator[np.ndarray]:
        """Global batches [B, length] int32, the last one padded with -1."""
        rows = self._rows()
        while True:
            batch = np.full((self.batch_size, self._shape.length), -1, np.int32)
            filled = 0
            for place, row in zip(range(self.batch_size), rows, strict=False):
                batch[place, : len(row)] = row
                filled = place + 1
            if filled:
                yield batch
            if filled < self.batch_size:
                return

    def _rows(self) -> Iterator[np.ndarray]:
        """As in shards: a source's rows end where the source ends."""
        length, stride = self._shape.length, self._shape.stride
        for source in self._sources:
            held = np.zeros(0, np.uint16)
            for tokens in self._tokens(source):
                held = np.concatenate([held, tokens])
                while len(held) >= length:
                    yield held[:length]
                    held = held[stride:]
            if len(held) > length - stride:
                yield held

    def _tokens(self, source: StreamSource) -> Iterator[np.ndarray]:
        documents = (d for d in source.reader.many(iter(range(source.size))) if d.is_held_out)
        for batch in batched_by_size(documents, _BATCH_BYTES, _BATCH_DOCUMENTS):
            yield from tokenize_documents(self._tokenizer, [document.text for document in batch])


class HeldOutStreamIterator(grain.DatasetIterator):
    def __init__(self, stream: HeldOutStream):
        super().__init__()
        self._stream = stream
        self.set_state({"batch": 0})

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batch = state["batch"]
        self._batches = self._stream.batches()
        for _ in zip(range(self._batch), self._batches, strict=False):
            pass

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        slots = self._stream.slots
        first = self._batch * self._stream.batch_size + slots.start
        self._batch += 1
        rows = batch[slots.start : slots.stop]
        return {"rows": rows, "row_ids": np.arange(first, first + len(rows), dtype=np.int64)}


def _take(buffer: collections.deque, offset: int, row: np.ndarray) -> None:
    """Copies tokens from `offset` of the first document on until `row` is full."""
    place = 0
    for tokens in buffer:
        piece = tokens[offset : offset + len(row) - place]
        row[place : place + len(piece)] = piece
        place += len(piece)
        offset = 0
        if place == len(row):
            return
