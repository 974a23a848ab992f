"""cuDNN's fused attention on GPU, by way of jax.nn.dot_product_attention, over shares.

Segments reach it as a mask of [B, 1, T, T], which it adds to the scores in bfloat16: memory grows with
T * T, though not with the heads. What causality hides it still skips. Its packed layout would need
no mask, but takes a fixed number of segments, and jax computes the offsets of keys from the number of
query heads, which is wrong where keys have fewer.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn.kernels.shares import on_shares
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mask import Places


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: Places,
    keys: Places,
    spec: AttentionSpec,
) -> jax.Array:
    """Self-attention within rows.

    Args:
      query: [B, T, N, H] bfloat16; key and value: [B, T, K, H] with N a multiple of K.
      queries, keys: of the T tokens; the positions of a segment follow each other.
      spec: without soft cap, and without a window unless causal.

    Returns:
      [B, T, N, H] bfloat16, named "attention" for rematerialization.

    Raises:
      ValueError: a size that does not divide over the mesh.
      RuntimeError: jax finds no cuDNN.
    """
    run = functools.partial(_fused, spec=spec)
    return on_shares(run, "btnh", query, key, value, queries, keys)


def _fused(query, key, value, queries, keys, *, spec):
    mask = queries.segment_ids[:, None, :, None] == keys.segment_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=spec.causal,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation="cudnn",
    )
    return checkpoint_name(out, "attention")
