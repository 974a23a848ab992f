"""From a process's rows to arrays over the whole mesh."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from llm_jax.core.types import Batch
from llm_jax.sharding.rules import AxisRules


@dataclasses.dataclass(frozen=True)
class RowShare:
    """This process reads share `index` of `count` equal, contiguous shares of the batch's rows.

    Processes that hold the same rows (their devices differ along "tensor" only) have one share.
    """

    index: int
    count: int


def batch_sharding(rules: AxisRules, batch_size: int, rank: int = 2) -> NamedSharding:
    """Rows over the mesh axes of "batch", everything else whole."""
    axes = ("batch",) + (None,) * (rank - 1)
    return rules.sharding(axes, (batch_size,) + (1,) * (rank - 1), "batch")


def row_share(rules: AxisRules, batch_size: int) -> RowShare:
    """Which rows of the global batch this process must read.

    Raises:
      ValueError: the rows of this process's devices are not one contiguous equal share.
    """
    sharding = batch_sharding(rules, batch_size, rank=1)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    ranges = {i[0].indices(batch_size)[:2] for i in indices}
    start, stop = min(r[0] for r in ranges), max(r[1] for r in ranges)
    size = sum(stop - start for start, stop in ranges)
    if size != stop - start or batch_size % size or start % size:
        raise ValueError(
            f"the rows of process {jax.process_index()} are not contiguous in the batch: "
            f"{sorted(ranges)}; order the mesh axes so that 'batch' axes come first"
        )
    return RowShare(start // size, batch_size // size)


def to_global_batch(batch: Mapping[str, np.ndarray], rules: AxisRules, batch_size: int) -> Batch:
    """Puts this process's rows on its devices as arrays [batch_size, ...] over the mesh.

    Returns at once: the transfer runs while the device computes.
    """
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(rules, batch_size, local.ndim),
            local,
            (batch_size, *local.shape[1:]),
        )
        for name, local in batch.items()
    }
