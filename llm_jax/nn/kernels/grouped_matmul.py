"""Rows of several experts, sorted by expert, times each expert's own matrix.

Accelerators have `jax.lax.ragged_dot`. XLA's CPU backend expands that into every expert times every
row, so there a loop over blocks of rows does the needed work only: each block belongs to one expert,
a last block of an expert reaches into the rows of the next, and those are written again by their own
block. `Precision.wide_output`, which is true on CPU, chooses.

The TPU compiler has a kernel for the product, but expands the gradient of the weights as CPU does
(libtpu 0.0.42 counts E times the work), so in bfloat16 that is jax's Pallas kernel `tgmm`.

Neither function is differentiable; nn/moe.py joins them into a derivative. Under `jax.vmap` they run
one after the other, because neither a loop nor `ragged_dot` gains from a batch.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.nn.precision import Precision

# Smaller blocks read the weights more often, larger ones waste rows at each expert's end; 64 to 256
# differ by under a tenth on a CPU of two cores. Fewer rows than a block, as in decoding, make a smaller
# one: each expert that has a row multiplies a whole block.
_BLOCK = 128

# Rows, and the width and height of the tile of a weight's gradient: its sums, its output twice, and
# both operands twice fit the 16 MiB of a TPU's scoped memory.
_TPU_TILE = (512, 512)


def grouped_matmul(
    precision: Precision,
    rows: jax.Array,
    weights: jax.Array,
    sizes: jax.Array,
    *,
    transposed: bool = False,
) -> jax.Array:
    """The product of each row with the matrix of its expert.

    Args:
      rows: [M, D], sorted by expert.
      weights: [E, D, F], or [E, F, D] if `transposed`.
      sizes: [E] int32, rows of each expert; their sum is at most M.

    Returns:
      [M, F] in the compute dtype; rows beyond the sum of the sizes hold nothing of use.
    """
    run = _block_product if precision.wide_output else _ragged_product
    run = jax.custom_batching.sequential_vmap(functools.partial(run, precision, transposed))
    return run(rows, weights, sizes)


def grouped_gradient(
    precision: Precision, rows: jax.Array, gradient: jax.Array, sizes: jax.Array
) -> jax.Array:
    """The gradient of `weights`: rows^T gradient, summed over the rows of each expert.

    Args:
      rows: [M, D]; gradient: [M, F]; sizes: [E] int32.

    Returns:
      [E, D, F] float32.
    """
    run = _block_gradient if precision.wide_output else _ragged_gradient
    run = jax.custom_batching.sequential_vmap(functools.partial(run, precision))
    return run(rows, gradient, sizes)


def _ragged(precision, x, y, sizes, contract, groups, out_dtype):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contract, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )
    full = precision.compute_dtype == "float32"
    return jax.lax.ragged_dot_general(
        precision.cast(x),
        precision.cast(y),
        sizes,
        numbers,
        precision=jax.lax.Precision.HIGHEST if full else None,
        preferred_element_type=out_dtype,
    )


def _ragged_product(precision, transposed, rows, weights, sizes):
    contract = ((1,), (2 if transposed else 1,))
    return _ragged(precision, rows, weights, sizes, contract, [0], precision.dtype)


def _ragged_gradient(precision, rows, gradient, sizes):
    run = functools.partial(_expanded_gradient, precision)
    if precision.compute_dtype == "float32":  # the kernel would round to bfloat16
        return run(rows, gradient, sizes)
    return jax.lax.platform_dependent(rows, gradient, sizes, tpu=_pallas_gradient, default=run)


def _expanded_gradient(precision, rows, gradient, sizes):
    # The contents of unused rows are unknown, and zero times NaN is not zero.
    used = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    rows, gradient = jnp.where(used, rows, 0), jnp.where(used, gradient, 0)
    return _ragged(precision, rows, gradient, sizes, ((0,), (0,)), [], jnp.float32)


def _pallas_gradient(rows, gradient, sizes, *, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    block, width = _TPU_TILE
    short = -rows.shape[0] % block
    rows, gradient = (jnp.pad(x, ((0, short), (0, 0))) for x in (rows, gradient))
    tiling = (block, min(width, rows.shape[1]), min(width, gradient.shape[1]))
    return tgmm(rows.T, gradient, sizes, jnp.float32, tiling, interpret=interpret)


def _block_rows(num_rows: int) -> int:
    return min(_BLOCK, 8 * -(-num_rows // 8))


def _blocks(sizes: jax.Array, num_rows: int, block: int) -> tuple[jax.Array, ...]:
    """Of each block its expert, first row and the end of its expert's rows; and how many there are."""
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // block)
    block_ends = jnp.cumsum(counts)
    index = jnp.arange(num_rows // block + sizes.shape[0], dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), sizes.shape[0] - 1)
    within = index - (block_ends - counts)[expert]
    return expert, (ends - sizes)[expert] + block * within, ends[expert], block_ends[-1]


def _padded(x: jax.Array, block: int) -> jax.Array:
    """So that a block that starts at the last row stays inside."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _block_product(precision, transposed, rows, weights, sizes):
    num_rows = rows.shape[0]
    size = _block_rows(num_rows)
    expert, start, _, count = _blocks(sizes, num_rows, size)
    spec = "sf,df->sd" if transposed else "sd,df->sf"
    padded = _padded(precision.cast(rows), size)
    width = weights.shape[1 if transposed else 2]

    def body(i, out):
        block = jax.lax.dynamic_slice_in_dim(padded, start[i], size)
        y = precision.einsum(spec, block, weights[expert[i]], out_dtype=out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start[i], 0)

    out = jnp.zeros((num_rows + size, width), jnp.float32)  # rounded once, not block by block
    return precision.cast(jax.lax.fori_loop(0, count, body, out)[:num_rows])


def _block_gradient(precision, rows, gradient, sizes):
    size = _block_rows(rows.shape[0])
    expert, start, end, count = _blocks(sizes, rows.shape[0], size)
    rows, gradient = (_padded(precision.cast(x), size) for x in (rows, gradient))

    def body(i, dw):
        own = start[i] + jnp.arange(size) < end[i]
        x = jax.lax.dynamic_slice_in_dim(rows, start[i], size)
        g = jax.lax.dynamic_slice_in_dim(gradient, start[i], size)
        x = jnp.where(own[:, None], x, 0)
        product = precision.einsum("sd,sf->df", x, g, out_dtype=jnp.float32)
        return dw.at[expert[i]].add(product)

    shape = (sizes.shape[0], rows.shape[1], gradient.shape[1])
    return jax.lax.fori_loop(0, count, body, jnp.zeros(shape, jnp.float32))
