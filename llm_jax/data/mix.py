"""Which source each row comes from: a fixed seeded pattern of 1024 rows that repeats.

Arithmetic instead of a draw per row: the source of row r, and how many rows of that source came
before it, are known for every r without a look at the others. Shares are rounded to 1/1024 by the
largest remainder, and a source with any weight gets at least one row in each 1024.
"""

import math
from collections.abc import Sequence

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.shuffle import EndlessOrder, derive_seed, permute

BLOCK = 1024


def block_counts(weights: list[float], block: int = BLOCK) -> np.ndarray:
    """How many of `block` rows each source gets: [S] int64 that sums to `block`.

    Raises:
      ConfigError: a negative weight, no weight above 0, or more sources than rows.
    """
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise ConfigError(f"a source has weight {weight}: expected a finite number >= 0")
    total = sum(weights)
    wanted = np.array(weights) > 0
    if total <= 0:
        raise ConfigError("every source has weight 0: give at least one a weight above 0")
    if wanted.sum() > block:
        raise ConfigError(f"{wanted.sum()} sources have a weight: at most {block} can be mixed")
    exact = np.array(weights) / total * block
    counts = np.where(wanted, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while counts.sum() != block:
        step = 1 if counts.sum() < block else -1
        gap = (exact - counts) * step
        gap[~wanted | (counts + step < 1)] = -np.inf
        counts[np.argmax(gap)] += step
    return counts


class Mixture:
    """Row number r to (source s, k: this is the k-th row of s), endless and exact."""

    def __init__(self, weights: list[float], seed: int):
        self.counts = block_counts(weights)
        ordered = np.repeat(np.arange(len(weights)), self.counts)
        self._pattern = ordered[permute(np.arange(BLOCK), BLOCK, derive_seed(seed, "mixture"))]
        is_source = self._pattern[:, None] == np.arange(len(weights))  # [BLOCK, S]
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), is_source.cumsum(0)])

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N] int64 row numbers to sources [N] int64 and their k [N] int64."""
        if len(self.counts) == 1:
            return np.zeros_like(numbers), numbers
        blocks, places = np.divmod(numbers, BLOCK)
        sources = self._pattern[places]
        return sources, blocks * self.counts[sources] + self._before[places, sources]

    def taken(self, number: int) -> np.ndarray:
        """How many of rows 0..number-1 came from each source: [S] int64."""
        blocks, place = divmod(number, BLOCK)
        return blocks * self.counts + self._before[place]


def in_order(sources: np.ndarray, turns: np.ndarray, orders: Sequence[EndlessOrder]) -> np.ndarray:
    """Which item of its source each turn falls on: [N] int64, from what a `Mixture` returns."""
    if len(orders) == 1:
        return orders[0](turns)
    items = np.empty_like(turns)
    for source in np.unique(sources).tolist():
        mine = sources == source
        items[mine] = orders[source](turns[mine])
    return items
