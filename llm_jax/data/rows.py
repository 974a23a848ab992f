"""Rows of token shards by number: row i of a shard is its tokens [i * stride, i * stride + length).

Next-token rows are one token longer than the stride, so each token but a shard's first is a target
exactly once. The last row of a shard is padded; nothing is dropped. Rows are read with `pread`
rather than through a memory map, whose pages would count as this process's memory.
"""

import dataclasses

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.atomic import NPY_HEADER_BYTES
from llm_jax.data.draw import Draw, EndlessDraw, OrderedDraw
from llm_jax.data.files import OpenFiles
from llm_jax.data.shards import ShardIndex, check_files
from llm_jax.data.shuffle import EndlessOrder


@dataclasses.dataclass(frozen=True)
class RowShape:
    """length: tokens in a row. stride: tokens from one row's start to the next one's."""

    length: int
    stride: int

    @staticmethod
    def of(sequence_length: int, row_length: int) -> "RowShape":
        """Rows one longer than the sequence overlap by that one; others lie side by side."""
        overlaps = row_length == sequence_length + 1
        return RowShape(row_length, sequence_length if overlaps else row_length)

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """How many rows shards of so many tokens have: [N] int64 to [N] int64."""
        return np.maximum(-(-(tokens - (self.length - self.stride)) // self.stride), 0)


class ShardRows:
    """The rows of one split of one source."""

    def __init__(self, index: ShardIndex, split: str, shape: RowShape):
        check_files(index)
        shards = index.shards[split]
        self._dtype = np.dtype(index.plan.dtype)
        self._shape = shape
        self._tokens = np.array([shard.tokens for shard in shards], np.int64)
        self._first = np.concatenate([[0], np.cumsum(shape.rows(self._tokens))]).astype(np.int64)
        self._files = OpenFiles([index.folder / shard.file for shard in shards])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, numbers: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Puts rows `numbers` [N] into `out[places]`, out: [B, length] int32; -1 pads."""
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        starts = (numbers - self._first[shards]) * self._shape.stride
        counts = np.minimum(self._shape.length, self._tokens[shards] - starts)
        item = self._dtype.itemsize
        offsets = NPY_HEADER_BYTES + starts * item
        pread, dtype = self._files.pread, self._dtype
        for place, shard, offset, count in zip(
            places.tolist(), shards.tolist(), offsets.tolist(), counts.tolist(), strict=True
        ):
            row = out[place]
            row[:count] = np.frombuffer(pread(shard, count * item, offset), dtype)
            row[count:] = -1


class Batches:
    """Rows of a run by their numbers: this process's part of a batch, or any other.

    Attributes:
      num_rows: None where there is no end.
    """

    def __init__(
        self, sources: list[ShardRows], draw: Draw, length: int, num_rows: int | None = None
    ):
        self._sources, self._draw, self._length = sources, draw, length
        self.num_rows, self.epochs = num_rows, draw.epochs

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows `numbers` [B] int64 of the run: [B, length] int32, -1 past the end."""
        return self._read(*self._draw(numbers))

    def partners(self, numbers: np.ndarray) -> np.ndarray:
        """For each row an unrelated one of the same split: [B, length] int32."""
        return self._read(*self._draw.partners(numbers))

    def _read(self, which: np.ndarray, items: np.ndarray) -> np.ndarray:
        out = np.empty((len(which), self._length), np.int32)
        out[which < 0] = -1
        for source, rows in enumerate(self._sources):
            places = np.flatnonzero(which == source)
            rows.read(items[places], out, places)
        return out


def open_train(
    indices: list[ShardIndex], weights: list[float], seed: int, shape: RowShape
) -> Batches:
    """Raises ConfigError if a source with a weight has no row to train on."""
    sources = [ShardRows(index, "train", shape) for index in indices]
    for rows, weight, index in zip(sources, weights, indices, strict=True):
        if weight > 0 and not len(rows):
            raise ConfigError(
                f"data: {index.source['path']!r} has no document to train on "
                f"({index.documents('held_out')} held out): add documents or lower "
                "data.held_out_fraction"
            )
    orders = [
        EndlessOrder(len(rows), seed, index.folder.name)
        for rows, index in zip(sources, indices, strict=True)
    ]
    return Batches(sources, EndlessDraw(weights, orders, seed), shape.length)


def open_held_out(indices: list[ShardIndex], shape: RowShape) -> Batches:
    """Raises ConfigError if nothing is held out."""
    sources = [ShardRows(index, "held_out", shape) for index in indices]
    draw = OrderedDraw([len(rows) for rows in sources])
    if not len(draw):
        total = sum(index.plan.documents for index in indices)
        raise ConfigError(
            f"data: none of {total} documents is held out: raise data.held_out_fraction to evaluate"
        )
    return Batches(sources, draw, shape.length, len(draw))
