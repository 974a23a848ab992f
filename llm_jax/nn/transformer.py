"""The one Transformer core: a block and a stack of them.

The stack holds its layers as one block whose parameters have a leading layer axis, and runs them
with `jax.lax.scan`: compile time does not grow with depth. Generation runs them one by one, because
slicing a stacked parameter costs a copy of it for every token: see `unstack`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal
from llm_jax.nn.attention import Attention, AttentionConfig
from llm_jax.nn.cache import KVCache
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.mlp import Mlp, MlpConfig
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.remat import RematPolicy, remat
from llm_jax.nn.rope import RopeConfig, rope_tables
from llm_jax.sharding.rules import constrain

Capture = Literal["attention", "residual"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """scan_unroll: layers in one turn of the loop over layers; see models/gpt/config.py."""

    embed_dim: int
    num_layers: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig
    rope: RopeConfig | None = None
    dropout: float = 0.0
    remat: RematPolicy = "none"
    init_stddev: float = 0.02
    scan_unroll: int = 1


class Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: TransformerConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        # The residual stream sums 2L outputs, so each starts smaller (GPT-2, section 2.3).
        out_init = normal(config.init_stddev / (2 * config.num_layers) ** 0.5)
        makers = {
            "init": normal(config.init_stddev), "out_init": out_init,
            "precision": precision, "rngs": rngs,
        }  # fmt: skip
        self.attention_norm = Norm(config.embed_dim, config.norm, precision=precision, rngs=rngs)
        self.attention = Attention(config.embed_dim, config.attention, **makers)
        self.mlp_norm = Norm(config.embed_dim, config.norm, precision=precision, rngs=rngs)
        self.mlp = Mlp(config.embed_dim, config.mlp, **makers)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        rope: tuple[jax.Array, jax.Array] | None,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        capture: tuple[Capture, ...] = (),
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
        """x: [B, T, D]; mask: [B, T, S]; key: drops units when given."""
        keys = (None, None) if key is None else jax.random.split(key)
        y, weights, cache = self.attention(
            self.attention_norm(x),
            mask,
            rope=rope,
            cache=cache,
            layer=layer,
            keep_weights="attention" in capture,
        )
        x = x + dropout(y, self.config.dropout, keys[0])
        y = self.mlp(self.mlp_norm(x))
        x = x + dropout(y, self.config.dropout, keys[1])
        x = constrain(x, "batch", "length", "activation_embed")
        available = {"attention": weights, "residual": x}
        return x, cache, {name: available[name] for name in capture}


class Stack(nnx.Module):
    """L blocks. `layers` is one block with stacked parameters, or an nnx.List after `unstack`."""

    def __init__(self, config: TransformerConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        self.layers = stacked(
            lambda rngs: Block(config, precision=precision, rngs=rngs), config.num_layers, rngs
        )

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        *,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        capture: tuple[Capture, ...] = (),
    ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
        """Runs all blocks.

        Args:
          x: [B, T, D] in the compute dtype.
          places: of the T tokens.
          key: one key for the dropout of all layers, or None for no dropout.
          cache: continues generation; the T tokens are appended.
          capture: "residual" gives [L, B, T, D] after each block, "attention" [L, B, K, G, T, S].
        """
        config = self.config
        rope = config.rope and rope_tables(config.rope, config.attention.head_dim, places.positions)
        if cache is not None:
            cache = cache.with_places(places)
        keys = places if cache is None else cache.places
        mask = attention_mask(places, keys, causal=config.attention.causal)
        if cache is None and not isinstance(self.layers, nnx.List):
            x, captured = self._scan(x, mask, rope, key, capture)
            return x, None, captured
        rows = []
        for layer, block in enumerate(self.blocks()):
            x, cache, row = block(
                x, mask, rope=rope, key=layer_key(key, layer), cache=cache, layer=layer,
                capture=capture,
            )  # fmt: skip
            rows.append(row)
        captured = {name: jnp.stack([row[name] for row in rows]) for name in capture}
        return x, cache and cache.advanced(x.shape[1]), captured

    def blocks(self) -> list[Block]:
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        graphdef, state = nnx.split(self.layers)
        return [
            nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
            for i in range(self.config.num_layers)
        ]

    def _scan(self, x, mask, rope, key, capture):
        graphdef, state = nnx.split(self.layers)

        def body(x, layer):
            index, state = layer
            block = nnx.merge(graphdef, state)
            x, _, captured = block(x, mask, rope=rope, key=layer_key(key, index), capture=capture)
            return x, captured

        body = remat(body, self.config.remat)
        layers = (jnp.arange(self.config.num_layers), state)
        return jax.lax.scan(
            body, x, layers, unroll=min(self.config.scan_unroll, self.config.num_layers)
        )


def layer_key(key: jax.Array | None, layer: jax.Array | int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, layer)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest (Srivastava et al. 2014); no key, no change."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def stacked(make, num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters are those of `num_layers`, along a new first axis "layers"."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(rngs)

    module = build(rngs)
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layers", *variable.axes))
    return module


def unstack(model: nnx.Module) -> nnx.Module:
    """The same model with every Stack's layers apart, for generation; shares no memory with it."""
    model = nnx.clone(model)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Stack) and not isinstance(module.layers, nnx.List):
            module.layers = nnx.List(module.blocks())
    return model
