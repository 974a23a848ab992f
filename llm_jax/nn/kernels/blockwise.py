"""Attention in plain jnp over blocks of queries and keys (Rabe and Staats 2021; Dao et al. 2022).

Runs on every backend: for long rows on CPU, and wherever the faster kernels cannot go. Memory grows
with T; no array is larger than a block of scores.

One loop walks the pairs of blocks that the static mask leaves, listed beforehand: where the mask is
causal half of them, with a window a band. The gradient is one such loop too, which computes scores
again from the logsumexp. Each share of a sequence has a list of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn.kernels.shares import length_shares, natural_order, on_shares
from llm_jax.nn.kernels.spec import MASKED, AttentionSpec
from llm_jax.nn.kernels.visible import Visible
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.precision import Precision
from llm_jax.sharding.rules import AxisRules, active_rules

# A CPU wants a block of scores in its cache (64 to 128 measured alike, 512 half as fast);
# an accelerator wants products that fill its matrix units.
CPU_BLOCK, ACCELERATOR_BLOCK = 128, 512


def attention(
    precision: Precision,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: Places,
    keys: Places,
    spec: AttentionSpec,
    *,
    block: int | None = None,
) -> jax.Array:
    """Self-attention within rows.

    Args:
      query: [B, N, T, H]; key and value: [B, K, T, H] with N a multiple of K.
      queries, keys: of the T tokens; the positions of a segment follow each other.
      block: the most queries, and the most keys, of one block; None: what suits the platform.

    Returns:
      [B, N, T, H] in the compute dtype, named "attention" for rematerialization.

    Raises:
      ValueError: a size that does not divide over the mesh.
    """
    if block is None:
        block = CPU_BLOCK if precision.platform == "cpu" else ACCELERATOR_BLOCK
    rules = active_rules()
    pairs = _pairs(Visible.of(spec), query.shape[2], block, rules)
    table_specs = () if rules is None else (rules.spec("length", None, None),)
    run = functools.partial(_in_blocks, precision, spec, block)
    return on_shares(run, "bnth", query, key, value, queries, keys, pairs, table_specs=table_specs)


@functools.lru_cache(maxsize=64)
def _pairs(visible: Visible, length: int, block: int, rules: AxisRules | None) -> np.ndarray:
    """The pairs of blocks that each share visits.

    Returns:
      [shares, P, 3] int32: block of queries, block of keys, and 0 where a shorter list only waits for
      the others: a loop of known length needs no look at its condition, which a GPU must wait for.
    """
    shares = natural_order(rules, length).reshape(length_shares(rules), -1)
    edges = [(first, min(first + block, length) - 1) for first in range(0, length, block)]
    lists = []
    for order in shares:
        parts = np.split(order, range(block, len(order), block))
        lists.append([
            (i, j, 1)
            for i, part in enumerate(parts)
            for j, edge in enumerate(edges)
            if visible.extent(int(part.min()), int(part.max()), *edge) is not False
        ])  # fmt: skip
    longest = max(map(len, lists))
    return np.array([
        pairs + [(*pairs[-1][:2], 0)] * (longest - len(pairs)) for pairs in lists
    ], np.int32)  # fmt: skip


def _in_blocks(precision, spec, block, query, key, value, queries, keys, pairs):
    """The local share: [B, N, T, H] by whole keys, filled up to whole blocks."""
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # Scaled in float32: the scale itself is no bfloat16 number for a head_dim of 128.
    query = precision.cast(query.astype(jnp.float32) * head_dim**-0.5)
    query = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    key, value = precision.cast(key), precision.cast(value)
    query, key, value = (_fill(x, x.ndim - 2, block, 0) for x in (query, key, value))
    queries, keys = (
        Places(_fill(p.segment_ids, 1, block, -1), _fill(p.positions, 1, block, 0))
        for p in (queries, keys)
    )
    out = _attend(precision, spec, block, query, key, value, queries, keys, jnp.asarray(pairs[0]))
    return out[..., :length, :].reshape(batch, num_heads, length, head_dim)


def _fill(x: jax.Array, axis: int, block: int, value: int) -> jax.Array:
    size = x.shape[axis]
    width = min(block, size)
    if size % width == 0:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -size % width)
    return jnp.pad(x, padding, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(precision, spec, block, query, key, value, queries, keys, pairs):
    """query: [B, K, G, T, H], scaled; key, value: [B, K, S, H]; pairs: [P, 3]; to query's shape."""
    arguments = (query, key, value, queries, keys, pairs)
    return _attend_forward(precision, spec, block, *arguments)[0]


def _attend_forward(precision, spec, block, query, key, value, queries, keys, pairs):
    def body(step, carry):
        most, total, out = carry  # [B, K, G, T] twice, [B, K, G, T, H], all float32
        i, j, _ = pair = pairs[step]
        scores = _scores(precision, spec, block, query, key, queries, keys, pair)
        before = _block(most, i, 3, block)
        now = jnp.maximum(before, scores.max(-1))
        weights = jnp.exp(scores - now[..., None])
        fade = jnp.exp(before - now)
        values = precision.einsum(
            "bkgts,bksh->bkgth", precision.cast(weights), _block(value, j, 2, block),
            out_dtype=jnp.float32,
        )  # fmt: skip
        sums = _block(total, i, 3, block) * fade + weights.sum(-1)
        values += _block(out, i, 3, block) * fade[..., None]
        put = functools.partial(_put, index=i, axis=3, block=block)
        return put(most, now), put(total, sums), put(out, values)

    rows = query.shape[:-1]
    carry = (
        jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )  # fmt: skip
    most, total, out = lax.fori_loop(0, len(pairs), body, carry)
    # Named here, so that the residuals are the arrays that a rematerialization policy keeps.
    out = checkpoint_name(precision.cast(out / total[..., None]), "attention")
    logsumexp = checkpoint_name(most + jnp.log(total), "attention")
    return out, (query, key, value, queries, keys, pairs, out, logsumexp)


def _attend_backward(precision, spec, block, residuals, d_out):
    query, key, value, queries, keys, pairs, out, logsumexp = residuals
    # sum_s weights * d_weights, by way of the output (Dao et al. 2022, appendix B.4)
    correction = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    product = functools.partial(precision.einsum, out_dtype=jnp.float32)

    def body(step, carry):
        d_query, d_key, d_value = carry
        i, j, _ = pair = pairs[step]
        of_queries = functools.partial(_block, index=i, axis=3, block=block)
        of_keys = functools.partial(_block, index=j, axis=2, block=block)
        scores = _scores(precision, spec, block, query, key, queries, keys, pair)
        weights = jnp.exp(scores - of_queries(logsumexp)[..., None])
        d_outs = of_queries(d_out)
        d_weights = product("bkgth,bksh->bkgts", d_outs, of_keys(value))
        d_scores = weights * (d_weights - of_queries(correction)[..., None])
        if spec.soft_cap is not None:
            # Masked scores lie outside the cap, where the weight, exactly 0, must win over the slope.
            d_scores *= jnp.maximum(1 - (scores / spec.soft_cap) ** 2, 0)
        weights, d_scores = precision.cast(weights), precision.cast(d_scores)
        d_values = product("bkgts,bkgth->bksh", weights, d_outs)
        d_keys = product("bkgts,bkgth->bksh", d_scores, of_queries(query))
        d_queries = product("bkgts,bksh->bkgth", d_scores, of_keys(key))
        return (
            _put(d_query, of_queries(d_query) + d_queries, i, 3, block),
            _put(d_key, of_keys(d_key) + d_keys, j, 2, block),
            _put(d_value, of_keys(d_value) + d_values, j, 2, block),
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    grads = lax.fori_loop(0, len(pairs), body, zeros)
    return *(d.astype(x.dtype) for d, x in zip(grads, residuals, strict=False)), *[None] * 3


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(precision, spec, block, query, key, queries, keys, pair):
    """[B, K, G, block, block] float32, capped and masked."""
    i, j, counts = pair
    scores = precision.einsum(
        "bkgth,bksh->bkgts",
        _block(query, i, 3, block),
        _block(key, j, 2, block),
        out_dtype=jnp.float32,
    )
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    at = lambda places, index: jax.tree.map(lambda x: _block(x, index, 1, block), places)  # noqa: E731
    mask = attention_mask(at(queries, i), at(keys, j), causal=spec.causal, window=spec.window)
    mask &= counts > 0  # a query has seen itself before a pair that does not count
    return jnp.where(mask[:, None, None], scores, MASKED)


def _block(x: jax.Array, index: jax.Array, axis: int, block: int) -> jax.Array:
    size = min(block, x.shape[axis])
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(x: jax.Array, update: jax.Array, index: jax.Array, axis: int, block: int) -> jax.Array:
    size = min(block, x.shape[axis])
    return lax.dynamic_update_slice_in_dim(x, update, index * size, axis)
