"""The one Transformer core: a block and a stack of them.

The stack holds its layers as one block whose parameters have a leading layer axis, and runs them
with `jax.lax.scan`: compile time does not grow with depth. Over a mesh with stages it runs them as a
pipeline (nn/pipeline.py). Generation runs them one by one, because
slicing a stacked parameter costs a copy of it for every token: see `unstack`.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal
from llm_jax.nn.attention import Attention, AttentionConfig, Sight, see
from llm_jax.nn.cache import KVCache
from llm_jax.nn.mask import Places
from llm_jax.nn.mlp import Mlp, MlpConfig
from llm_jax.nn.moe import Moe, MoeConfig, RouterSums
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.pipeline import run_pipeline
from llm_jax.nn.precision import Precision
from llm_jax.nn.remat import RematPolicy, name_input, remat
from llm_jax.nn.rope import RopeConfig, rope_tables
from llm_jax.sharding.rules import active_rules, constrain

Capture = Literal["attention", "residual"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """scan_unroll: layers in one turn of the loop over layers; see models/gpt/config.py."""

    embed_dim: int
    num_layers: int
    attention: AttentionConfig
    mlp: MlpConfig | MoeConfig
    norm: NormConfig
    rope: RopeConfig | None = None
    dropout: float = 0.0
    remat: RematPolicy = "none"
    init_stddev: float = 0.02
    scan_unroll: int = 1


class StackOutput(NamedTuple):
    """Of a block or a stack: x [B, T, D], the advanced cache, tensors asked for, router statistics.

    router: RouterSums of the mixture of experts, of a stack [L, ...] each; None without experts.
    """

    x: jax.Array
    cache: KVCache | None
    captured: dict[str, jax.Array]
    router: RouterSums | None


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
        mlp = Moe if isinstance(config.mlp, MoeConfig) else Mlp
        self.mlp = mlp(config.embed_dim, config.mlp, **makers)

    @jax.named_scope("layers")
    def __call__(
        self,
        x: jax.Array,
        sight: Sight,
        *,
        rope: tuple[jax.Array, jax.Array] | None,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        capture: tuple[Capture, ...] = (),
    ) -> StackOutput:
        """x: [B, T, D]; key: drops units when given."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = name_input(x)
        with jax.named_scope("attention_norm"):
            y = self.attention_norm(x)
        with jax.named_scope("attention"):
            y, weights, cache = self.attention(
                y,
                sight,
                rope=rope,
                cache=cache,
                layer=layer,
                keep_weights="attention" in capture,
            )
        x = x + dropout(y, self.config.dropout, keys[0])
        x = constrain(x, "batch", "residual_length", "activation_embed")
        with jax.named_scope("mlp_norm"):
            y, router = self.mlp_norm(x), None
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, Moe):
                y, router = self.mlp(y, sight.queries.segment_ids > 0)
            else:
                y = self.mlp(y)
        x = x + dropout(y, self.config.dropout, keys[1])
        x = constrain(x, "batch", "residual_length", "activation_embed")
        available = {"attention": weights, "residual": x}
        return StackOutput(x, cache, {name: available[name] for name in capture}, router)


class Stack(nnx.Module):
    """L blocks. `layers` is one block with stacked parameters, or an nnx.List after `unstack`."""

    def __init__(self, config: TransformerConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
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
    ) -> StackOutput:
        """Runs all blocks.

        Args:
          x: [B, T, D] in the compute dtype.
          places: of the T tokens.
          key: one key for the dropout of all layers, or None for no dropout.
          cache: continues generation; the T tokens are appended.
          capture: "residual" gives [L, B, T, D] after each block, "attention" [L, B, K, G, T, S].
        """
        apart = isinstance(self.layers, nnx.List)
        rules = active_rules()
        if cache is None and not apart and rules is not None and rules.shares("stage") > 1:
            return self._pipeline(x, places, key, capture, rules)
        if cache is not None:
            cache = cache.with_places(places)
        keys = places if cache is None else cache.places
        sight, rope = self._prepare(places, keys, cache is not None, capture)
        if cache is None and not apart:
            return self._scan(x, sight, rope, key, capture)
        rows = []
        for layer, block in enumerate(self.blocks()):
            out = block(
                x, sight, rope=rope, key=layer_key(key, layer), cache=cache, layer=layer,
                capture=capture,
            )  # fmt: skip
            x, cache = out.x, out.cache
            rows.append((out.captured, out.router))
        captured, router = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return StackOutput(x, cache and cache.advanced(x.shape[1]), captured, router)

    def blocks(self) -> list[Block]:
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        graphdef, state = nnx.split(self.layers)
        return [
            nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
            for i in range(self.config.num_layers)
        ]

    def _prepare(self, places, keys, cached, capture):
        """What all layers share: (sight, rope tables or None)."""
        config = self.config
        sight = see(
            config.attention, self.precision, places, keys,
            cached=cached, keep_weights="attention" in capture,
        )  # fmt: skip
        rope = config.rope and rope_tables(config.rope, config.attention.head_dim, places.positions)
        return sight, rope

    def _scan(self, x, sight, rope, key, capture):
        graphdef, state = nnx.split(self.layers)

        def body(x, layer):
            index, state = layer
            block = nnx.merge(graphdef, state)
            out = block(x, sight, rope=rope, key=layer_key(key, index), capture=capture)
            return out.x, (out.captured, out.router)

        num_layers = self.config.num_layers
        unroll = min(self.config.scan_unroll, num_layers)
        # A loop of one turn is none, and the layers that are left over are in none.
        unrolled = unroll == num_layers or num_layers % unroll > 0
        body = remat(body, self.config.remat, unrolled=unrolled)
        layers = (jnp.arange(num_layers), state)
        x, (captured, router) = jax.lax.scan(body, x, layers, unroll=unroll)
        return StackOutput(x, None, captured, router)

    def _pipeline(self, x, places, key, capture, rules):
        """Each microbatch draws its own dropout, so dropout differs from that of `_scan`."""
        if capture:
            raise ValueError(
                f"capture={capture} needs all layers in one place: use a mesh with pipeline=1"
            )
        graphdef, state = nnx.split(self.layers)

        def layer(state, index, x, places, microbatch):
            sight, rope = self._prepare(places, places, False, ())
            mine = None if key is None else jax.random.fold_in(key, microbatch)
            out = nnx.merge(graphdef, state)(x, sight, rope=rope, key=layer_key(mine, index))
            return out.x, out.router

        x, router = run_pipeline(remat(layer, self.config.remat), state, x, places, rules)
        return StackOutput(x, None, {}, router)


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
