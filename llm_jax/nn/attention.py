"""Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm_jax.core.param import Initializer, param, zeros
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.rope import apply_rope
from llm_jax.sharding.rules import constrain

MASKED = -1e30  # finite, so that a row with nothing to see does not turn into NaN


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # on query, key and value
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    causal: bool = True

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )


def attention_weights(
    query: jax.Array, key: jax.Array, mask: jax.Array, precision: Precision
) -> jax.Array:
    """Softmax over the visible keys: [B, K, G, T, S] float32; shapes as dot_product_attention."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = (batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query = query.reshape(grouped) * head_dim**-0.5
    scores = precision.einsum("btkgh,bskh->bkgts", query, key, out_dtype=jnp.float32)
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot_product_attention(
    precision: Precision, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention in plain jnp, the reference for every kernel.

    The gradient is written out: in bfloat16 it keeps nothing that grows with T * S, in float32 the
    weights once.

    Args:
      query: [B, T, N, H], key and value: [B, S, K, H] with N a multiple of K.
      mask: [B, T, S] bool, True where the query sees the key.

    Returns:
      [B, T, N, H] in the compute dtype.
    """
    return _attention_forward(precision, query, key, value, mask)[0]


def _attention_forward(precision, query, key, value, mask):
    weights = precision.cast(attention_weights(query, key, mask, precision))
    # Rounded before the axes move: XLA's CPU backend has no bfloat16 product with float32 sums that
    # also moves them, and fails on the keys of a cache.
    out = precision.einsum("bkgts,bskh->bkgth", weights, value)
    out = jnp.moveaxis(out, 3, 1).reshape(query.shape)
    # The weights are the one residual that grows with T * S. They are kept only where computing them
    # again takes longer than reading them back.
    kept = weights if precision.compute_dtype == "float32" else None
    return out, (query, key, value, mask, out, kept)


def _attention_backward(precision, residuals, d_out):
    query, key, value, mask, out, weights = residuals
    if weights is None:
        weights = precision.cast(attention_weights(query, key, mask, precision))
    grouped = (*query.shape[:2], key.shape[2], query.shape[2] // key.shape[2], query.shape[3])
    scale = query.shape[-1] ** -0.5
    # sum_s weights * d_weights, by way of the output (Dao et al. 2022, appendix B.4)
    correction = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)  # [B, T, N]
    correction = correction.reshape(grouped[:-1]).transpose(0, 2, 3, 1)[..., None]
    d_out = d_out.reshape(grouped)
    d_value = precision.einsum("bkgts,btkgh->bskh", weights, d_out)
    d_weights = precision.einsum("btkgh,bskh->bkgts", d_out, value, out_dtype=jnp.float32)
    d_scores = precision.cast(weights * (d_weights - correction) * scale)
    d_query = precision.einsum("bkgts,bskh->btkgh", d_scores, key).reshape(query.shape)
    d_key = precision.einsum("bkgts,btkgh->bskh", d_scores, query.reshape(grouped))
    cast = lambda d, like: d.astype(like.dtype)  # noqa: E731
    return cast(d_query, query), cast(d_key, key), cast(d_value, value), None


dot_product_attention.defvjp(_attention_forward, _attention_backward)


class Attention(nnx.Module):
    """Self-attention: [B, T, D] to [B, T, D].

    Weights keep their head axes: query [D, N, H], key and value [D, K, H], out [N, H, D].
    """

    def __init__(
        self,
        embed_dim: int,
        config: AttentionConfig,
        *,
        init: Initializer,
        out_init: Initializer,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.config, self.precision = config, precision
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        query_axes, kv_axes = ("heads", "head_dim"), ("kv_heads", "head_dim")
        self.query = param(rngs, (embed_dim, heads, head_dim), ("embed", *query_axes), init)
        self.key = param(rngs, (embed_dim, kv_heads, head_dim), ("embed", *kv_axes), init)
        self.value = param(rngs, (embed_dim, kv_heads, head_dim), ("embed", *kv_axes), init)
        self.out = param(rngs, (heads, head_dim, embed_dim), (*query_axes, "embed"), out_init)
        if config.bias:
            self.query_bias = param(rngs, (heads, head_dim), query_axes, zeros)
            self.key_bias = param(rngs, (kv_heads, head_dim), kv_axes, zeros)
            self.value_bias = param(rngs, (kv_heads, head_dim), kv_axes, zeros)
        if config.out_bias:
            self.out_bias = param(rngs, (embed_dim,), ("embed",), zeros)
        if config.qk_norm is not None:
            self.query_norm = Norm(
                head_dim, config.qk_norm, precision=precision, rngs=rngs, axis="head_dim"
            )
            self.key_norm = Norm(
                head_dim, config.qk_norm, precision=precision, rngs=rngs, axis="head_dim"
            )

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        rope: tuple[jax.Array, jax.Array] | None = None,
        cache=None,
        layer: int | None = None,
        keep_weights: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, object]:
        """Returns (output [B, T, D], weights [B, K, G, T, S] float32 if kept, cache).

        Args:
          mask: [B, T, S]; S = T, or the cache's length when one is given.
          rope: tables of `rope_tables`, or None.
          cache: a KVCache that already notes the places of these tokens, written at `layer`.
        """
        config, p = self.config, self.precision
        query = self._project(x, "query", "btd,dnh->btnh")
        key = self._project(x, "key", "btd,dkh->btkh")
        value = self._project(x, "value", "btd,dkh->btkh")
        if config.qk_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        query = constrain(query, "batch", "length", "heads", None)
        key = constrain(key, "batch", "length", "kv_heads", None)
        value = constrain(value, "batch", "length", "kv_heads", None)
        if cache is not None:
            cache = cache.with_layer(layer, key, value)
            key, value = (jnp.swapaxes(a[layer], 1, 2) for a in (cache.keys, cache.values))
        out = dot_product_attention(p, query, key, value, mask)
        weights = attention_weights(query, key, mask, p) if keep_weights else None
        out = checkpoint_name(out, "attention")
        # einsum sums over its labels in alphabetical order: with n and h it would transpose the
        # weight at every call, which takes as long as the product itself for a single token.
        y = p.einsum("btgh,ghd->btd", out, self.out[...])
        if config.out_bias:
            y = p.add_bias(y, self.out_bias[...])
        return y, weights, cache

    def _project(self, x: jax.Array, name: str, spec: str) -> jax.Array:
        y = self.precision.einsum(spec, x, getattr(self, name)[...])
        if self.config.bias:
            y = self.precision.add_bias(y, getattr(self, f"{name}_bias")[...])
        return y
