"""Seeded permutations by arithmetic: no list of indices is ever held, however long the corpus.

`permute` is a Feistel network over Z_a x Z_b with a * b >= n and a * b - n < a: each round adds to one
half a hash of the other, which can be undone, hence a bijection (Luby and Rackoff 1988; four rounds).
The few values that land outside 0..n-1 are sent through again (cycle walking, Black and Rogaway
2002). All of it is integer arithmetic of 64 bits, so an order is the same on every machine, under
every version of numpy, for ever.
"""

import functools
import math

import numpy as np

_ROUNDS = 4
_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """One Python integer to 64 well mixed bits (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The places of `indices` under the permutation of 0..size-1 that `seed` picks.

    Args:
      indices: [N] int64 in 0..size-1.

    Returns:
      [N] int64, a bijection of 0..size-1.
    """
    if size < 2:
        return np.zeros(len(indices), np.int64)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(seed)
    result = _feistel(indices.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], rows, columns, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(indices: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(indices, np.uint64(columns))
    for number in range(_ROUNDS):
        if number % 2 == 0:
            left = (left + _hash(right, keys[number])) % np.uint64(rows)
        else:
            right = (right + _hash(left, keys[number])) % np.uint64(columns)
    return left * np.uint64(columns) + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """[N] uint64 to [N] uint64 below 2**32, so that adding a half of an index cannot overflow."""
    values = (values ^ key) * np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    return values >> np.uint64(32)


@functools.lru_cache(maxsize=4096)
def _round_keys(seed: int) -> np.ndarray:
    return np.array([mix64(seed * _ROUNDS + i) for i in range(_ROUNDS)], np.uint64)


def derive_seed(*parts: int | str) -> int:
    """One seed of 64 bits out of several numbers and names, the same on every machine."""
    seed = 0
    for part in parts:
        number = part if isinstance(part, int) else int.from_bytes(part.encode(), "little")
        while True:  # folds a name longer than eight bytes in piece by piece
            seed = mix64(seed ^ mix64(number & _MASK))
            number >>= 64
            if number in (0, -1):
                break
    return seed


class EndlessOrder:
    """Item number k of an endless walk over `size` items: epoch k // size, each epoch shuffled anew.

    Args:
      seed: the run's shuffle seed.
      name: the source's key, so that two sources of one size are in unrelated orders.
    """

    def __init__(self, size: int, seed: int, name: str):
        self.size, self._seed, self._name = size, seed, name

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """[N] int64 >= 0 to [N] int64 in 0..size-1."""
        epochs, places = np.divmod(numbers, self.size)
        if not len(numbers):
            return places
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self.in_epoch(places, first)
        result = np.empty_like(places)
        for epoch in range(first, last + 1):
            inside = epochs == epoch
            result[inside] = self.in_epoch(places[inside], epoch)
        return result

    def in_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        return permute(places, self.size, _epoch_seed(self._seed, self._name, epoch))


class GroupedOrder(EndlessOrder):
    """Like `EndlessOrder`, but items of one group (a Parquet row group) stay together.

    Reading one item of a group decompresses all of it, so a walk that jumps between groups would
    decompress the corpus once per item. Groups are shuffled, and the items inside each.

    Args:
      starts: [G + 1] int64, the first item of each group and the number of items.
    """

    def __init__(self, starts: np.ndarray, seed: int, name: str):
        super().__init__(int(starts[-1]), seed, name)
        self._starts, self._sizes = starts, np.diff(starts)
        self._layout = functools.lru_cache(maxsize=2)(self._make_layout)

    def in_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        groups, ends = self._layout(epoch)
        turn = np.searchsorted(ends, places, side="right")
        group = groups[turn]
        inside = places - (ends[turn] - self._sizes[group])
        result = np.empty_like(places)
        for number in np.unique(group):
            mine = group == number
            seed = derive_seed(_epoch_seed(self._seed, self._name, epoch), int(number))
            shuffled = permute(inside[mine], int(self._sizes[number]), seed)
            result[mine] = self._starts[number] + shuffled
        return result

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups in this epoch's order, and where each ends in it."""
        count = len(self._sizes)
        seed = _epoch_seed(self._seed, self._name, epoch)
        groups = permute(np.arange(count), count, seed)
        return groups, np.cumsum(self._sizes[groups])


@functools.lru_cache(maxsize=4096)
def _epoch_seed(seed: int, name: str, epoch: int) -> int:
    return derive_seed(seed, name, epoch)
