"""Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

import dataclasses

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


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    precision: Precision,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention in plain jnp, the reference for every kernel.

    Args:
      query: [B, T, N, H], key and value: [B, S, K, H] with N a multiple of K.
      mask: [B, T, S] bool, True where the query sees the key.

    Returns:
      ([B, T, N, H] in the compute dtype, weights [B, K, G, T, S] float32).
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = (batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query = query.reshape(grouped) * head_dim**-0.5
    scores = precision.einsum("btkgh,bskh->bkgts", query, key, out_dtype=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    out = precision.einsum("bkgts,bskh->btkgh", precision.cast(weights), value)
    return out.reshape(batch, length, num_heads, head_dim), weights


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
            self.query_norm = Norm(head_dim, config.qk_norm, axis="head_dim", rngs=rngs)
            self.key_norm = Norm(head_dim, config.qk_norm, axis="head_dim", rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        rope: tuple[jax.Array, jax.Array] | None = None,
        cache=None,
        layer: int | None = None,
    ) -> tuple[jax.Array, jax.Array, object]:
        """Returns (output [B, T, D], weights [B, K, G, T, S] float32, cache).

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
            key, value = cache.keys[layer], cache.values[layer]
        out, weights = dot_product_attention(query, key, value, mask, p)
        out = checkpoint_name(out, "attention")
        y = p.einsum("btnh,nhd->btd", out, self.out[...])
        if config.out_bias:
            y = y + p.cast(self.out_bias[...])
        return y, weights, cache

    def _project(self, x: jax.Array, name: str, spec: str) -> jax.Array:
        y = self.precision.einsum(spec, x, getattr(self, name)[...])
        if self.config.bias:
            y = y + self.precision.cast(getattr(self, f"{name}_bias")[...])
        return y
