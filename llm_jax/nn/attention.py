"""Multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import Initializer, param, zeros
from llm_jax.nn.cache import KVCache
from llm_jax.nn.kernels import attention as kernels
from llm_jax.nn.kernels.reference import attention_weights, dot_product_attention
from llm_jax.nn.kernels.spec import AttentionSpec, Kernel
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.rope import apply_rope
from llm_jax.sharding.rules import active_rules, constrain


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # on query, key and value
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    spec: AttentionSpec = dataclasses.field(default_factory=AttentionSpec)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )


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
            self.out_bias = param(rngs, (embed_dim,), ("features",), zeros)
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
        sight: "Sight",
        *,
        rope: tuple[jax.Array, jax.Array] | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        keep_weights: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, KVCache | None]:
        """Returns (output [B, T, D], weights [B, K, G, T, S] float32 if kept, cache).

        Args:
          sight: of the T tokens; made by `see`.
          rope: tables of `rope_tables`, or None.
          cache: a KVCache that already notes the places of these tokens, written at `layer`.
        """
        config, p = self.config, self.precision
        layout = kernels.layout(sight.kernel)
        query, key, value = (self._project(x, name, layout) for name in ("query", "key", "value"))
        if config.qk_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = (apply_rope(a, rope, layout, p.platform) for a in (query, key))
        query = _pin(query, layout, "heads", "length")
        # Each query may see keys of the whole row; the other kernels gather them themselves.
        whole = None if sight.kernel == "reference" else "length"
        key, value = (_pin(a, layout, "kv_heads", whole) for a in (key, value))
        if cache is not None:
            cache = cache.with_layer(layer, key, value)
            key, value = (jnp.swapaxes(a[layer], 1, 2) for a in (cache.keys, cache.values))
        cap = config.spec.soft_cap
        if sight.mask is not None:
            out = dot_product_attention(p, query, key, value, sight.mask, cap)
        else:
            out = kernels.attention(
                sight.kernel, p, query, key, value, sight.queries, sight.keys, config.spec
            )
        weights = attention_weights(query, key, sight.mask, p, cap) if keep_weights else None
        # einsum sums over its labels in alphabetical order: with n and h it would transpose the
        # weight at every call, which takes as long as the product itself for a single token.
        spec = {"btnh": "btgh,ghd->btd", "bnth": "bgth,ghd->btd"}[layout]
        y = p.project(spec, out, self.out[...])
        if config.out_bias:
            y = p.add_bias(y, self.out_bias[...])
        return y, weights, cache

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


def see(
    config: AttentionConfig,
    precision: Precision,
    queries: Places,
    keys: Places,
    *,
    cached: bool,
    keep_weights: bool,
) -> Sight:
    """Chooses the kernel; a cache and kept weights need the reference.

    Raises:
      ValueError: a kernel that was asked for and cannot run here.
    """
    rules = active_rules()
    kernel = "reference"
    if not (cached or keep_weights):
        kernel = kernels.choose(
            precision.attention_kernel,
            precision.platform,
            config.spec,
            length=queries.positions.shape[1],
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            compute_dtype=precision.compute_dtype,
            context_shares=rules.shares("length") if rules else 1,
        )
    mask = None
    if kernel == "reference":
        spec = config.spec
        mask = attention_mask(queries, keys, causal=spec.causal, window=spec.window)
    return Sight(queries, keys, mask, kernel)


def _pin(x: jax.Array, layout: str, heads: str, length: str | None) -> jax.Array:
    axes = {"b": "batch", "t": length, "n": heads, "h": None}
    return constrain(x, *(axes[letter] for letter in layout))
