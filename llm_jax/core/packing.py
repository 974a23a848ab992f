"""From rows of packed token ids to segments, positions and next-token batches, on the host.

A row is a window of an endless stream of documents, each of which starts with `bos_id`; -1 pads a
row whose stream ended. This is the cost centre of the loader: the segments are written run by run
(`np.repeat` over the few document starts) rather than by cumulative sums over every token.

Examples of their own, a fixed number in each row, are laid out by `RowLayout`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


def segments_and_positions(tokens: np.ndarray, bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Which document of its row each token belongs to, and its place inside it.

    Args:
      tokens: [B, T] int32, -1 is padding.

    Returns:
      segment_ids: [B, T] int32: 1 for the first document of a row, even one that the row enters in
        the middle, then 2, 3, ...; 0 for padding.
      positions: [B, T] int32 from 0 at each `bos_id` and at the start of the row; 0 for padding.
    """
    batch, length = tokens.shape
    is_start = tokens == bos_id
    is_start[:, :1] = True
    starts = np.flatnonzero(is_start)
    sizes = np.diff(starts, append=batch * length)
    row_of = starts // max(length, 1)
    first_of_row = np.searchsorted(starts, np.arange(batch) * length)
    numbers = np.arange(1, len(starts) + 1) - first_of_row[row_of]
    segment_ids = np.repeat(numbers.astype(np.int32), sizes).reshape(tokens.shape)
    positions = np.arange(batch * length, dtype=np.int32)
    positions -= np.repeat(starts.astype(np.int32), sizes)
    positions = positions.reshape(tokens.shape)
    if tokens.size and tokens.min() < 0:
        padding = tokens < 0
        segment_ids[padding] = 0
        positions[padding] = 0
    return segment_ids, positions


def next_token_batch(rows: np.ndarray, bos_id: int, eos_id: int) -> dict[str, np.ndarray]:
    """The batch of next-token prediction from rows that overlap by one token.

    The weight is 0 where the token or the target is padding, and where the target is a `bos_id`
    that only opens a document: what comes after an end of document is unrelated to it. Where one id
    is both, it marks the end as well, so it is predicted.

    Args:
      rows: [B, T + 1] int32, -1 is padding.

    Returns:
      tokens, targets, segment_ids, positions: [B, T] int32; loss_weights: [B, T] float32.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if bos_id == eos_id:
        weights = np.ones(targets.shape, np.float32)
    else:
        weights = (targets != bos_id).astype(np.float32)
    if rows.size and rows.min() < 0:
        weights *= (inputs >= 0) & (targets >= 0)
    segment_ids, positions = segments_and_positions(inputs, bos_id)
    return {
        "tokens": np.maximum(inputs, 0),
        "targets": np.maximum(targets, 0),
        "loss_weights": weights,
        "segment_ids": segment_ids,
        "positions": positions,
    }


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Where examples of unequal length stand in rows: `per_row` in each, one after another.

    segment_ids: [B, T] int32, 1 for the first example of a row, even if it is empty, then 2, ...; 0 is
      padding.
    positions: [B, T] int32, from 0 in each example; 0 for padding.
    """

    segment_ids: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[int], per_row: int, length: int) -> "RowLayout":
        """Sizes of B * per_row examples; those of a row must fit in `length` together: see `overfull`."""
        sizes = np.asarray(sizes, np.int64).reshape(-1, per_row)
        real = np.arange(length) < sizes.sum(axis=1)[:, None]
        flat = sizes.ravel()
        segment_ids, positions = (np.zeros(real.shape, np.int32) for _ in range(2))
        segment_ids[real] = np.repeat(np.tile(np.arange(1, per_row + 1), len(sizes)), flat)
        positions[real] = np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)
        return cls(segment_ids, positions)

    def filled(
        self, examples: Sequence[Sequence[int]], padding: int, dtype: type = np.int32
    ) -> np.ndarray:
        """[B, T] of one value for each token of the examples."""
        real = self.segment_ids > 0
        values = np.full(real.shape, padding, dtype)
        values[real] = np.fromiter(itertools.chain.from_iterable(examples), dtype)
        return values


def overfull(sizes: Sequence[int], per_row: int, length: int) -> np.ndarray:
    """[N] int64: the rows whose examples do not fit."""
    totals = np.asarray(sizes, np.int64).reshape(-1, per_row).sum(axis=1)
    return np.flatnonzero(totals > length)


def pad_rows(rows: Sequence[Sequence[int]], length: int, padding: int) -> np.ndarray:
    """[B, length] int32 of rows of at most `length` ids."""
    return RowLayout.of([len(row) for row in rows], 1, length).filled(rows, padding)
