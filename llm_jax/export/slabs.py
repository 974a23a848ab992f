"""Arrays in C order, piece by piece, from views in another order of axes.

numpy copies a transposed matrix at a tenth of the memory's speed where its rows are a power of two apart, as
they are in most models: the lines of a column then fall on few places of the cache. Tiles that go through a
buffer with longer rows do not, and pieces that are written and forgotten need no fresh memory.
"""

from collections.abc import Iterator

import numpy as np

_BYTES = 2**23  # of a piece
_TILE = 256
_PADDING = 16


def slabs(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of x, contiguous, in order; a piece is valid until the next one is asked for."""
    if x.ndim == 0 or not x.size:
        yield np.ascontiguousarray(x)
        return
    step = max(1, _BYTES // max(1, x[0].nbytes))
    if x.flags.c_contiguous:
        for start in range(0, len(x), step):
            yield x[start : start + step]
        return
    scratch = np.empty((min(step, len(x)), *x.shape[1:]), x.dtype)
    tile = np.empty((_TILE, _TILE + _PADDING), x.dtype)
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        out = scratch[: len(rows)]
        if x.ndim == 2 and abs(x.strides[0]) < abs(x.strides[1]):
            _transpose(rows, out, tile)
        else:
            out[...] = rows
        yield out


def _transpose(x: np.ndarray, out: np.ndarray, tile: np.ndarray) -> None:
    """out[...] = x, [m, n] whose columns are contiguous."""
    for i in range(0, x.shape[0], _TILE):
        for j in range(0, x.shape[1], _TILE):
            part = x[i : i + _TILE, j : j + _TILE]
            held = tile[: part.shape[1], : part.shape[0]]
            held[...] = part.T
            out[i : i + _TILE, j : j + _TILE] = held.T
