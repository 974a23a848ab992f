"""Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023), to oneself or across."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import Initializer, param, zeros
from llm_jax.nn.cache import KVCache
from llm_jax.nn.kernels import attention as kernels
from llm_jax.nn.kernels.reference import (
    attention_weights,
    cached_attention,
    dot_product_attention,
)
from llm_jax.nn.kernels.spec import AttentionSpec, Kernel
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.rope import apply_rope
from llm_jax.sharding.rules import active_rules, constrain


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """bias: on query, key and value.

    scale: of the scores; None: head_dim ** -0.5.
    qk_norm_over: whether each head of query and key is normed for itself (Qwen3) or all together (OLMo 2).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    qk_norm_over: Literal["head", "all_heads"] = "head"
    scale: float | None = None
    spec: AttentionSpec = dataclasses.field(default_factory=AttentionSpec)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"attention scale {self.scale} must be positive")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a decoder attends to across: the encoder's output x [B, S, D], and its places."""

    x: jax.Array
    places: Places


class Attention(nnx.Module):
    """[B, T, D] to [B, T, D].

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
            self.out_bias = param(rngs, (embed_dim,), ("features",), zeros)
        if config.qk_norm is not None:
            makers = {"precision": precision, "rngs": rngs}
            if config.qk_norm_over == "head":
                norm = lambda _: Norm(head_dim, config.qk_norm, axis="head_dim", **makers)  # noqa: E731
            else:
                norm = lambda count: Norm(count * head_dim, config.qk_norm, **makers)  # noqa: E731
            self.query_norm, self.key_norm = norm(heads), norm(kv_heads)

    def __call__(
        self,
        x: jax.Array,
        sight: "Sight",
        *,
        cross: bool = False,
        memory: Memory | None = None,
        rope: tuple[jax.Array, jax.Array] | None = None,
        bias: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        keep_weights: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, KVCache | None]:
        """Returns (output [B, T, D], weights [B, K, G, T, S] float32 if kept, cache).

        Args:
          sight: of the T tokens; made by `see`.
          cross: keys and values are those of `memory`, or, with a cache, what is there of it already.
          rope: tables of `rope_tables`, or None.
          bias: [N, T, S], added to the scores; the reference kernel only.
          cache: a KVCache that already notes the places of these tokens, written at `layer`.
        """
        config, p, spec = self.config, self.precision, sight.spec
        layout = kernels.layout(sight.kernel)
        query = self._query(x, layout)
        if rope is not None:
            query = apply_rope(query, rope, layout, p.platform)
        query = _pin(query, layout, "heads", "length")
        if cross and cache is not None:
            stores = (cache.memory_keys, cache.memory_values)
            key, value = (jnp.swapaxes(store[layer], 1, 2) for store in stores)
        else:
            key, value = self.keys_values(memory.x if cross else x, layout, rope)
            # Each query may see keys of the whole row; the other kernels gather them themselves.
            whole = None if sight.kernel == "reference" else "length"
            key, value = (_pin(a, layout, "kv_heads", whole) for a in (key, value))
        if cache is not None and not cross:
            cache = cache.with_layer(layer, key, value)
            stored = (cache.keys[layer], cache.values[layer])
            out = cached_attention(p, query, *stored, sight.mask, spec.soft_cap, bias)
            key = jnp.moveaxis(cache.by_rows(stored[0]), 0, 2)
        elif sight.mask is not None:
            out = dot_product_attention(p, query, key, value, sight.mask, spec.soft_cap, bias)
        else:
            out = kernels.attention(
                sight.kernel, p, query, key, value, sight.queries, sight.keys, spec
            )
        weights = None
        if keep_weights:
            weights = attention_weights(query, key, sight.mask, p, spec.soft_cap, bias)
        # einsum sums over its labels in alphabetical order: with n and h it would transpose the
        # weight at every call, which takes as long as the product itself for a single token.
        einsum = {"btnh": "btgh,ghd->btd", "bnth": "bgth,ghd->btd"}[layout]
        y = p.project(einsum, out, self.out[...])
        if config.out_bias:
            y = p.add_bias(y, self.out_bias[...])
        return y, weights, cache

    def keys_values(
        self,
        x: jax.Array,
        layout: str = "btnh",
        rope: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x: [B, S, D], each [B, S, K, H], or [B, K, S, H] for layout "bnth"."""
        key, value = self._project(x, "key", layout), self._project(x, "value", layout)
        if self.config.qk_norm is not None:
            key = self._norm(self.key_norm, key, layout)
        if rope is not None:
            key = apply_rope(key, rope, layout, self.precision.platform)
        return key, value

    def _query(self, x: jax.Array, layout: str) -> jax.Array:
        config = self.config
        query = self._project(x, "query", layout)
        if config.qk_norm is not None:
            query = self._norm(self.query_norm, query, layout)
        if config.scale is not None:  # the kernels multiply by head_dim ** -0.5
            factor = config.scale * config.head_dim**0.5
            query = query if factor == 1 else (query * factor).astype(query.dtype)
        return query

    def _norm(self, norm: Norm, x: jax.Array, layout: str) -> jax.Array:
        if self.config.qk_norm_over == "head":
            return norm(x)
        x = jnp.swapaxes(x, 1, 2) if layout == "bnth" else x
        y = norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return jnp.swapaxes(y, 1, 2) if layout == "bnth" else y

    def _project(self, x: jax.Array, name: str, layout: str) -> jax.Array:
        y = self.precision.project(f"btd,dnh->{layout}", x, getattr(self, name)[...])
        if not self.config.bias:
            return y
        bias = getattr(self, f"{name}_bias")[...]
        if layout == "btnh":
            return self.precision.add_bias(y, bias)
        return y + bias.astype(y.dtype)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What the layers of a stack share: who sees whom, and by which kernel.

    mask: [B, T, S] bool where the kernel is the plain reference, else None.
    """

    queries: Places
    keys: Places
    mask: jax.Array | None
    kernel: Kernel = dataclasses.field(metadata={"static": True})
    spec: AttentionSpec = dataclasses.field(metadata={"static": True})


def see(
    config: AttentionConfig,
    precision: Precision,
    queries: Places,
    keys: Places,
    *,
    spec: AttentionSpec,
    reference: bool = False,
    prefix: jax.Array | None = None,
    visible: jax.Array | None = None,
) -> Sight:
    """Chooses the kernel.

    Args:
      reference: only that kernel will do: for a cache, across, for kept weights and biases.
      prefix, visible: [B, S] and [B, T, S], see `attention_mask`; need the reference.

    Raises:
      ValueError: a kernel that was asked for and cannot run here.
    """
    rules = active_rules()
    kernel = "reference"
    if not reference and prefix is None and visible is None:
        kernel = kernels.choose(
            precision.attention_kernel,
            precision.platform,
            spec,
            length=queries.positions.shape[1],
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            compute_dtype=precision.compute_dtype,
            context_shares=rules.shares("length") if rules else 1,
        )
    mask = None
    if kernel == "reference":
        mask = attention_mask(
            queries, keys, causal=spec.causal, window=spec.window, prefix=prefix, visible=visible
        )
    return Sight(queries, keys, mask, kernel, spec)


def _pin(x: jax.Array, layout: str, heads: str, length: str | None) -> jax.Array:
    axes = {"b": "batch", "t": length, "n": heads, "h": None}
    return constrain(x, *(axes[letter] for letter in layout))
