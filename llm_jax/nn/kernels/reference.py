"""Attention in plain jnp over the whole [T, S] square: the reference for every kernel.

It is also the fastest one on CPU for short rows. The gradient is written out: in bfloat16 it keeps
nothing that grows with T * S, in float32 the weights once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn.kernels.spec import MASKED
from llm_jax.nn.precision import Precision


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array,
    precision: Precision,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax over the visible keys: [B, K, G, T, S] float32; shapes as dot_product_attention."""
    return _softmax(_scores(query, key, precision, soft_cap), mask, bias)


def _scores(query, key, precision, soft_cap):
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = (batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query = query.reshape(grouped) * head_dim**-0.5
    scores = precision.einsum("btkgh,bskh->bkgts", query, key, out_dtype=jnp.float32)
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _softmax(scores, mask, bias):
    if bias is not None:
        scores = scores + bias.reshape(scores.shape[1:])
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)


def cached_attention(
    precision: Precision,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """`dot_product_attention` to key and value of a KVCache, [K * B, S, H], which it takes as they lie."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[0] // batch
    query = (query * head_dim**-0.5).reshape(batch, length, num_kv_heads, -1, head_dim)
    query = query.transpose(2, 0, 3, 1, 4)  # [K, B, G, T, H]
    shape = (*query.shape[:-1], key.shape[1])
    rows = query.reshape(key.shape[0], -1, head_dim)
    scores = precision.einsum("xqh,xsh->xqs", rows, key, out_dtype=jnp.float32).reshape(shape)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias.reshape(num_kv_heads, 1, -1, *bias.shape[1:])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
    weights = precision.cast(weights).reshape(*rows.shape[:2], -1)
    out = precision.einsum("xqs,xsh->xqh", weights, value).reshape(query.shape)
    return out.transpose(1, 3, 0, 2, 4).reshape(batch, length, num_heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def dot_product_attention(
    precision: Precision,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention.

    Args:
      query: [B, T, N, H], key and value: [B, S, K, H] with N a multiple of K.
      mask: [B, T, S] bool, True where the query sees the key.
      soft_cap: bounds the scores, see AttentionSpec.
      bias: [N, T, S] float32, added to the scores of every row.

    Returns:
      [B, T, N, H] in the compute dtype, named "attention" for rematerialization.
    """
    return _attention_forward(precision, query, key, value, mask, soft_cap, bias)[0]


def _attention_forward(precision, query, key, value, mask, soft_cap, bias):
    weights = precision.cast(attention_weights(query, key, mask, precision, soft_cap, bias))
    # Rounded before the axes move: XLA's CPU backend has no bfloat16 product with float32 sums that
    # also moves them, and fails on the keys of a cache.
    out = precision.einsum("bkgts,bskh->bkgth", weights, value)
    out = jnp.moveaxis(out, 3, 1).reshape(query.shape)
    # Named here, so that the residual is the array that a rematerialization policy keeps.
    out = checkpoint_name(out, "attention")
    # The weights are the one residual that grows with T * S. They are kept only where computing them
    # again takes longer than reading them back, and where they are all that the gradient needs.
    kept = weights if precision.compute_dtype == "float32" and soft_cap is None else None
    return out, (query, key, value, mask, bias, out, kept)


def _attention_backward(precision, soft_cap, residuals, d_out):
    query, key, value, mask, bias, out, weights = residuals
    slope = query.shape[-1] ** -0.5  # of the scores, by the product of query and key
    if weights is None:
        scores = _scores(query, key, precision, soft_cap)
        weights = precision.cast(_softmax(scores, mask, bias))
        if soft_cap is not None:
            slope *= 1 - (scores / soft_cap) ** 2
    grouped = (*query.shape[:2], key.shape[2], query.shape[2] // key.shape[2], query.shape[3])
    # sum_s weights * d_weights, by way of the output (Dao et al. 2022, appendix B.4)
    correction = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)  # [B, T, N]
    correction = correction.reshape(grouped[:-1]).transpose(0, 2, 3, 1)[..., None]
    d_out = d_out.reshape(grouped)
    d_value = precision.einsum("bkgts,btkgh->bskh", weights, d_out)
    d_weights = precision.einsum("btkgh,bskh->bkgts", d_out, value, out_dtype=jnp.float32)
    d_scores = weights * (d_weights - correction)
    d_bias = None if bias is None else jnp.sum(d_scores, 0).reshape(bias.shape)
    d_scores = precision.cast(d_scores * slope)
    d_query = precision.einsum("bkgts,bskh->btkgh", d_scores, key).reshape(query.shape)
    d_key = precision.einsum("bkgts,btkgh->bskh", d_scores, query.reshape(grouped))
    cast = lambda d, like: d.astype(like.dtype)  # noqa: E731
    return cast(d_query, query), cast(d_key, key), cast(d_value, value), None, d_bias


dot_product_attention.defvjp(_attention_forward, _attention_backward)
