"""Which item of which source a row of the run is, by arithmetic on the row's number.

The same for rows of shards and for records: training walks endlessly over a mixture of shuffled sources,
evaluation goes over every item once.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llm_jax.data.mix import Mixture, in_order
from llm_jax.data.shuffle import EndlessOrder

# No run trains on as many rows, and numbers twice this large are exact everywhere in the arithmetic.
_FAR = 1 << 40


class Draw(Protocol):
    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N] int64 of the run to sources [N] int64, -1 past the end, and items of theirs [N]."""

    def partners(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for an unrelated row to go with each, another one if there is any."""

    def epochs(self, rows_done: int) -> list[float]:
        """How often each source has been gone through after `rows_done` rows of the run."""


class EndlessDraw:
    """Sources follow the mixture's pattern; within one, items come in a new order each epoch."""

    def __init__(self, weights: list[float], orders: Sequence[EndlessOrder], seed: int):
        self._mixture, self._orders = Mixture(weights, seed), orders
        self._sizes = np.array([order.size for order in orders], np.int64)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, turns = self._mixture(numbers)
        return sources, in_order(sources, turns, self._orders)

    def partners(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row far ahead in the run; where that is the row itself, half the source further on."""
        own_sources, own_items = self(numbers)
        sources, items = self(numbers + _FAR)
        sizes = self._sizes[sources]
        is_same = (sources == own_sources) & (items == own_items)
        return sources, np.where(is_same, (items + sizes // 2) % sizes, items)

    def epochs(self, rows_done: int) -> list[float]:
        return (self._mixture.taken(rows_done) / np.maximum(self._sizes, 1)).tolist()


class OrderedDraw:
    """All items once, source after source."""

    def __init__(self, sizes: Sequence[int]):
        self._first = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources = np.searchsorted(self._first, numbers, side="right") - 1
        items = numbers - self._first[sources]
        return np.where(numbers < len(self), sources, -1), items

    def partners(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row half of all rows further on; padding stays padding."""
        further = (numbers + len(self) // 2) % max(len(self), 1)
        return self(np.where(numbers < len(self), further, numbers))

    def epochs(self, rows_done: int) -> list[float]:
        done = np.clip(rows_done - self._first[:-1], 0, None)
        return np.minimum(done / np.maximum(np.diff(self._first), 1), 1.0).tolist()
