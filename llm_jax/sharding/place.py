"""From a process's rows to arrays over the whole mesh.

Which devices a process has is the machine's business: on a TPU pod the rows of its devices lie apart in
the global batch. So the global batch may hold the rows in another order than the loader counts them; a
sum over rows does not mind.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from llm_jax.core.types import Batch
from llm_jax.sharding.rules import AxisRules

Rows = tuple[
    int, int
]  # first row of the global batch that a device holds, and the one after the last


@dataclasses.dataclass(frozen=True)
class RowShare:
    """This process reads share `index` of `count` equal, contiguous shares of the loader's rows.

    Processes that hold the same rows (their devices differ along "tensor" only) have one share.
    """

    index: int
    count: int


def batch_sharding(rules: AxisRules, shape: tuple[int, ...]) -> NamedSharding:
    """Rows over the mesh axes of "batch"; of sequences [B, T], the tokens over those of "length".

    Raises:
      ValueError: rows or tokens that do not divide over the mesh.
    """
    if len(shape) == 2:
        rules.length_order(shape[1])
        return rules.sharding(("batch", "length"), shape, "batch")
    return rules.sharding(("batch",) + (None,) * (len(shape) - 1), shape, "batch")


def row_share(rules: AxisRules, batch_size: int) -> RowShare:
    """Which rows this process must read; see `share_of`."""
    placed = batch_sharding(rules, (batch_size,)).devices_indices_map((batch_size,))
    rows: dict[int, set[Rows]] = {}
    for device, (piece,) in placed.items():
        rows.setdefault(device.process_index, set()).add(piece.indices(batch_size)[:2])
    return share_of(jax.process_index(), rows)


def share_of(process: int, rows: Mapping[int, Iterable[Rows]]) -> RowShare:
    """The share of one process, given the rows that the devices of each process hold.

    Raises:
      ValueError: two processes hold some rows together and others not, which no share can serve.
    """
    distinct = sorted({tuple(sorted(r)) for r in rows.values()})
    pieces = [piece for share in distinct for piece in share]
    if len(set(pieces)) != len(pieces) or len({len(share) for share in distinct}) != 1:
        raise ValueError(
            f"the mesh gives the processes unequal or overlapping rows of the batch ({distinct}): "
            "choose mesh.data x mesh.fsdp as a multiple of the processes, or a divisor of them"
        )
    return RowShare(distinct.index(tuple(sorted(rows[process]))), len(distinct))


def to_global_batch(batch: Mapping[str, np.ndarray], rules: AxisRules, batch_size: int) -> Batch:
    """Puts this process's rows on its devices as arrays [batch_size, ...] over the mesh.

    Returns at once: the transfer runs while the device computes. The tokens of sequences stand in
    `rules.length_order`; their positions and targets move with them.

    Args:
      batch: the rows of this process's share; or all `batch_size` rows, the same on every process,
        which then keep their order.
    """
    placed = batch_sharding(rules, (batch_size,)).addressable_devices_indices_map((batch_size,))
    firsts = sorted({piece.indices(batch_size)[0] for (piece,) in placed.values()})

    def place(local: np.ndarray) -> jax.Array:
        whole = len(local) == batch_size
        shape = (batch_size, *local.shape[1:])
        sharding = batch_sharding(rules, shape)
        if local.ndim == 2 and rules.shares("length") > 1:
            local = local[:, rules.length_order(local.shape[1])]

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(batch_size)
            if not whole:
                first, stop = (firsts.index(first) * (stop - first) + x for x in (0, stop - first))
            return local[(slice(first, stop), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: place(local) for name, local in batch.items()}
