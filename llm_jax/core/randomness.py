"""Random numbers of rows: number j of a row is a function of (seed, name of the draw, row id, j).

There is no generator and no state, so a row's draws do not depend on the batch, the process or the
thread it is made in, and a resumed run repeats them. It is the SplitMix64 generator (Steele, Lea and
Flood 2014) entered at any place: one pass of integer arithmetic over a whole batch, some 3 ns a number,
the same on every machine and under every version of numpy. A generator object per row costs 10 us.
"""

import functools
import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
# Up to so many items, 20 bits or more of a 32-bit key are left to chance; numpy sorts 32 bits 8 times
# faster than 64.
_MOST_IN_32_BITS = 4096


class RowRandom:
    """Draws for the rows of one batch.

    Args:
      seed: of the objective; any int.
      row_ids: [B] int64, the rows' numbers in the run.
    """

    def __init__(self, seed: int, row_ids: np.ndarray):
        self._seed = seed
        self._rows = row_ids.astype(np.uint64) * _GAMMA

    def bits(self, draw: str, count: int) -> np.ndarray:
        """[B, count] uint32, uniform. The first numbers of a longer draw are those of a shorter one.

        Args:
          draw: names what is decided; each name is a stream of its own.
        """
        keys = _mix(self._rows + _key(self._seed, draw))
        counters = np.arange(1, (count + 1) // 2 + 1, dtype=np.uint64) * _GAMMA
        return _mix(keys[:, None] + counters).astype("<u8", copy=False).view("<u4")[:, :count]

    def below(self, draw: str, bounds: np.ndarray | int) -> np.ndarray:
        """[B] int64 in 0..bounds - 1, for bounds of [B] or one for all; 0 where a bound is 0."""
        return scaled(self.bits(draw, 1)[:, 0], bounds)

    def happens(self, draw: str, probability: float) -> np.ndarray:
        """[B] bool, True with this probability."""
        return self.bits(draw, 1)[:, 0] < probability * 2**32

    def order(self, draw: str, allowed: np.ndarray, width: int) -> np.ndarray:
        """The first `width` of each row's allowed columns in random order.

        Args:
          allowed: [B, N] bool. N takes part in the draw: it must not depend on the batch.

        Returns:
          [B, min(width, N)] int64; N - 1 or more where a row has fewer allowed columns.
        """
        num_items = allowed.shape[1]
        shift = max(num_items - 1, 0).bit_length()
        kind = np.uint32 if num_items <= _MOST_IN_32_BITS else np.uint64
        # The column stands in the low bits of its key: a sort of values is far faster than argsort.
        keys = self.bits(draw, num_items).astype(kind)
        if kind is np.uint32:
            keys &= kind(2**32 - (1 << shift))
        else:
            keys <<= kind(shift)
        keys |= np.arange(num_items, dtype=kind)
        keys |= np.where(allowed, kind(0), kind(np.iinfo(kind).max))
        if width < num_items:
            keys = np.partition(keys, max(width - 1, 0), axis=1)[:, :width]
        keys.sort(axis=1)
        return (keys & kind((1 << shift) - 1)).astype(np.int64)

    def subset(self, draw: str, allowed: np.ndarray, sizes: np.ndarray, width: int) -> np.ndarray:
        """`sizes` of each row's allowed columns, ascending, every subset as likely as any other.

        Args:
          allowed: [B, N] bool; as of `order`.
          sizes: [B] int, at most the number of allowed columns and at most `width`.

        Returns:
          [B, min(width, N)] int64; N after the last chosen column.
        """
        chosen = self.order(draw, allowed, width)
        chosen[np.arange(chosen.shape[1]) >= sizes[:, None]] = allowed.shape[1]
        chosen.sort(axis=1)
        return chosen


def scaled(bits: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """uint32 numbers of any shape to int64 in 0..bounds - 1, by multiplication; 0 for a bound of 0."""
    return ((bits.astype(np.uint64) * np.asarray(bounds, np.uint64)) >> np.uint64(32)).astype(
        np.int64
    )


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@functools.lru_cache(maxsize=256)
def _key(seed: int, draw: str) -> np.uint64:
    digest = hashlib.blake2b(f"{seed}/{draw}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
