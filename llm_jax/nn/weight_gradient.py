"""Gradients of weights, reduced straight into the shares in which the weights lie.

A weight's gradient is a sum over the rows of the batch, which lie on many devices. Left to itself the
compiler all-reduces it whole and lets each device cut out its share: twice the bytes of a
reduce-scatter, and a buffer of the whole weight in float32. So the product runs under `shard_map` and
ends in `psum_scatter`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.sharding.rules import AxisRules

# The logical axis of each einsum letter (docs/architecture.md), in activations and in weights.
ACTIVATION_AXES = {
    "b": "batch",
    "t": "length",
    "n": "heads",
    "g": "heads",
    "k": "kv_heads",
    "f": "mlp",
}
WEIGHT_AXES = ACTIVATION_AXES | {"d": "embed"}


def weight_gradient(
    product: Callable[[str, jax.Array, jax.Array, jnp.dtype], jax.Array],
    spec: str,
    x: jax.Array,
    g: jax.Array,
    rules: AxisRules | None,
    dtype: jnp.dtype,
    reduce_dtype: jnp.dtype,
) -> jax.Array:
    """`product(spec, x, g, dtype)`, summed over the batch, in shares like the weight.

    Args:
      product: an einsum of whatever precision; its last argument is the dtype of the result.
      spec: of the gradient: "btd,btf->df" for a weight [D, F].
      x: the activations that met the weight; g: the gradient of what came out.
      reduce_dtype: in which the devices add their parts.
    """
    operands, labels = spec.split("->")
    if rules is None or rules.shares("batch") * rules.shares("length") == 1:
        return product(spec, x, g, dtype)
    x_labels, g_labels = operands.split(",")
    scattered = _scattered(rules, labels)
    reduced = [a for name in ("batch", "length") for a in rules.mesh_axes(name)]
    rest = tuple(a for a in reduced if scattered is None or a not in scattered[1])

    def local(x, g):
        d_w = product(spec, x, g, reduce_dtype)
        if scattered is not None:
            dimension, axes = scattered
            d_w = jax.lax.psum_scatter(d_w, axes, scatter_dimension=dimension, tiled=True)
        return (jax.lax.psum(d_w, rest) if rest else d_w).astype(dtype)

    activation = lambda labels: rules.spec(*(ACTIVATION_AXES.get(c) for c in labels))  # noqa: E731
    weight = [WEIGHT_AXES.get(c) for c in labels]
    if scattered is None:
        weight = [None if name == "embed" else name for name in weight]
    return jax.shard_map(
        local,
        mesh=rules.mesh,
        in_specs=(activation(x_labels), activation(g_labels)),
        out_specs=rules.spec(*weight),
        check_vma=False,
    )(x, g)


def _scattered(rules: AxisRules, labels: str) -> tuple[int, tuple[str, ...]] | None:
    """(dimension of the gradient, mesh axes) to scatter over, or None where D lies whole."""
    axes = rules.mesh_axes("embed")
    reduced = {*rules.mesh_axes("batch"), *rules.mesh_axes("length")}
    if not axes or not set(axes) <= reduced:
        return None
    return labels.index("d"), axes
