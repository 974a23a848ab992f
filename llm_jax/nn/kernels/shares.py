"""Runs an attention kernel on every device's share: of the batch, the heads and the queries.

Queries stay where they are; keys and values are gathered along the length and put back into their
natural order (`AxisRules.length_order`). The gradient of that gathering is a reduce-scatter, so no
device holds gradients of more keys than its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from llm_jax.nn.kernels.spec import Layout
from llm_jax.nn.mask import Places
from llm_jax.sharding.rules import AxisRules, active_rules


def on_shares(
    run: Callable[..., jax.Array],
    layout: Layout,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: Places,
    keys: Places,
    *tables: Any,
    table_specs: tuple = (),
) -> jax.Array:
    """`run(query, key, value, queries, keys, *tables)` per device; without active rules, once.

    Args:
      query, key, value: [B, T, N or K, H] for layout "btnh", [B, N or K, T, H] for "bnth".
      tables: further pytrees; table_specs: their partition specs under the active rules.

    Returns:
      The output, shaped like query.

    Raises:
      ValueError: a size that does not divide over the mesh.
    """
    rules = active_rules()
    if rules is None:
        return run(query, key, value, queries, keys, *tables)
    length_axis = layout.index("t")

    def spec(x, heads, name):
        axes = ("length", heads) if length_axis == 1 else (heads, "length")
        return rules.sharding(("batch", *axes, None), x.shape, f"attention {name}").spec

    specs = (
        spec(query, "heads", "query"), spec(key, "kv_heads", "key"),
        spec(value, "kv_heads", "value"), *[rules.spec("batch", "length")] * 2,
    )  # fmt: skip

    def local(query, key, value, queries, keys, *tables):
        key, value = (_whole_length(x, length_axis, rules) for x in (key, value))
        keys = jax.tree.map(lambda x: _whole_length(x, 1, rules), keys)
        return run(query, key, value, queries, keys, *tables)

    sharded = jax.shard_map(
        local, mesh=rules.mesh, in_specs=(*specs, *table_specs), out_specs=specs[0], check_vma=False
    )
    return sharded(query, key, value, queries, keys, *tables)


def _whole_length(x: jax.Array, axis: int, rules: AxisRules) -> jax.Array:
    """From the local share of a sequence to all of it, in natural order."""
    mesh_axes = rules.mesh_axes("length")
    if not mesh_axes:
        return x
    x = lax.all_gather(x, mesh_axes, axis=axis, tiled=True)
    places = np.argsort(rules.length_order(x.shape[axis]))  # where each natural index lies
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    slices = (lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1, axis=axis) for run in runs)
    return lax.concatenate(list(slices), axis)


def length_shares(rules: AxisRules | None) -> int:
    """Parts of a sequence."""
    return 1 if rules is None else rules.shares("length")


def natural_order(rules: AxisRules | None, length: int) -> np.ndarray:
    """[T] int32: the natural index of each place of a row as it lies on the mesh."""
    if length_shares(rules) == 1:
        return np.arange(length, dtype=np.int32)
    return rules.length_order(length).astype(np.int32)
