"""The one Transformer core: a stack of blocks (nn/block.py).

The stack holds its layers as one block whose parameters have a leading layer axis, and runs them
with `jax.lax.scan`: compile time does not grow with depth. Where layers differ in turn, as windowed and
global ones do, a turn of the loop is one period of them. Over a mesh with stages it runs them as a
pipeline (nn/pipeline.py). Generation runs them one by one, because
slicing a stacked parameter costs a copy of it for every token: see `unstack`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.nn.attention import Memory, see
from llm_jax.nn.block import (
    Block,
    Capture,
    LocalLayers,
    StackOutput,
    TransformerConfig,
    View,
    dropout,
)
from llm_jax.nn.cache import KVCache
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mask import Places
from llm_jax.nn.pipeline import run_pipeline
from llm_jax.nn.precision import Precision
from llm_jax.nn.relative import RelativeBias
from llm_jax.nn.remat import remat
from llm_jax.nn.rope import rope_tables
from llm_jax.sharding.rules import active_rules

__all__ = ["LocalLayers", "Memory", "Stack", "TransformerConfig", "dropout", "stacked", "unstack"]


class Stack(nnx.Module):
    """L blocks. `layers` is one block with stacked parameters, or an nnx.List after `unstack`."""

    def __init__(self, config: TransformerConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        if config.relative_bias is not None:
            self.relative_bias = RelativeBias(
                config.attention.num_heads,
                config.relative_bias,
                causal=config.attention.spec.causal,
                stddev=config.init_stddev,
                rngs=rngs,
            )
        self.layers = stacked(
            lambda rngs: Block(config, precision=precision, rngs=rngs), config.num_layers, rngs
        )

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        *,
        memory: Memory | None = None,
        prefix: jax.Array | None = None,
        visible: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        capture: tuple[Capture, ...] = (),
    ) -> StackOutput:
        """Runs all blocks.

        Args:
          x: [B, T, D] in the compute dtype.
          places: of the T tokens.
          memory: what cross-attention sees; with a cache its keys and values are there already.
          prefix: [B, T], 1 for tokens that their whole segment sees, though attention is causal.
          visible: [B, T, S] bool, False where a token must not see another, of the cache or of these.
          key: one key for the dropout of all layers, or None for no dropout.
          cache: continues generation; the T tokens are appended.
          capture: "residual" gives [L, B, T, D] after each block, "attention" and "cross_attention"
            [L, B, K, G, T, S].
        """
        apart = isinstance(self.layers, nnx.List)
        rules = active_rules()
        if cache is None and not apart and rules is not None and rules.shares("stage") > 1:
            self._check_pipeline(capture, prefix, visible)
            return self._pipeline(x, places, key, rules)
        if cache is not None:
            cache = cache.with_places(places)
        views = self._views(places, cache, memory, prefix, visible, capture)
        if cache is None and not apart:
            return self._scan(x, views, key, capture)
        rows = []
        for layer, block in enumerate(self.blocks()):
            out = block(
                x, views[layer % len(views)], key=layer_key(key, layer), cache=cache, layer=layer,
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

    def memory_keys_values(self, memory: Memory) -> tuple[tuple[jax.Array, ...], ...]:
        """What cross-attention of each layer sees, for a KVCache: keys and values [B, K, S, H]."""
        pairs = [block.cross_attention.keys_values(memory.x, "bnth") for block in self.blocks()]
        return tuple(zip(*pairs, strict=True))

    def _views(self, places, cache, memory, prefix, visible, capture) -> list[View]:
        """Of each layer of a period."""
        config, p = self.config, self.precision
        keys = places if cache is None else cache.places
        bias = self._bias(places, cache)
        reference = cache is not None or bias is not None or "attention" in capture
        across = None
        if config.cross_attention:
            seen = memory.places if cache is None else cache.memory_places
            # The memory is another row: its positions say nothing of what may be seen.
            spec = AttentionSpec(causal=False)
            across = see(config.attention, p, places, seen, spec=spec, reference=True)
        views = []
        for spec, rope in config.kinds:
            tables = rope and rope_tables(rope, config.attention.head_dim, places.positions)
            sight = see(
                config.attention, p, places, keys, spec=spec, reference=reference, prefix=prefix,
                visible=visible,
            )  # fmt: skip
            views.append(View(sight, tables, bias, memory, across))
        return [views[0]] * (config.period - 1) + [views[-1]]

    def _bias(self, places: Places, cache: KVCache | None) -> jax.Array | None:
        if self.config.relative_bias is None:
            return None
        rules = active_rules()
        if rules is not None and rules.shares("length") > 1:
            raise ValueError(
                "relative biases need whole sequences: use a mesh with context=1 for this model"
            )
        with jax.named_scope("relative_bias"):
            length = places.positions.shape[1]
            if cache is None:
                return self.relative_bias(length, length)
            return self.relative_bias.after(cache.length, length, cache.places.positions.shape[1])

    def _scan(self, x, views, key, capture):
        graphdef, state = nnx.split(self.layers)
        num_layers, period = self.config.num_layers, self.config.period
        turns = num_layers // period
        unroll = max(1, min(self.config.scan_unroll // period, turns))
        # A loop of one turn is none, and the layers that are left over are in none.
        unrolled = unroll == turns or turns % unroll > 0

        def run(x, index, state, place, unrolled):
            def layer(x, index, state):
                block = nnx.merge(graphdef, state)
                out = block(x, views[place], key=layer_key(key, index), capture=capture)
                return out.x, (out.captured, out.router)

            return remat(layer, self.config.remat, unrolled=unrolled)(x, index, state)

        def body(x, group):
            first, state = group
            rows = []
            for place in range(period):
                mine = jax.tree.map(lambda a, place=place: a[place], state) if period > 1 else state
                x, row = run(x, first + place, mine, place, unrolled)
                rows.append(row)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows) if period > 1 else row

        whole = turns * period
        groups = state
        if period > 1:
            groups = jax.tree.map(lambda a: a[:whole].reshape(turns, period, *a.shape[1:]), state)
        x, rows = jax.lax.scan(body, x, (jnp.arange(turns) * period, groups), unroll=unroll)
        if period > 1:
            rows = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), rows)
        for index in range(whole, num_layers):
            mine = jax.tree.map(lambda a, index=index: a[index], state)
            x, row = run(x, index, mine, index - whole, True)
            rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), rows, row)
        captured, router = rows
        return StackOutput(x, None, captured, router)

    def _check_pipeline(self, capture, prefix, visible) -> None:
        config = self.config
        obstacles = {
            f"capture={capture}": bool(capture),
            f"global_every={config.period}": config.local is not None,
            "a relative bias": config.relative_bias is not None,
            "cross-attention": config.cross_attention,
            "a prefix": prefix is not None,
            "what is visible": visible is not None,
        }
        for what, stands in obstacles.items():
            if stands:
                raise ValueError(f"{what} cannot be split into stages: use a mesh with pipeline=1")

    def _pipeline(self, x, places, key, rules):
        """Each microbatch draws its own dropout, so dropout differs from that of `_scan`."""
        graphdef, state = nnx.split(self.layers)

        def layer(state, index, x, places, microbatch):
            view = self._views(places, None, None, None, None, ())[0]
            mine = None if key is None else jax.random.fold_in(key, microbatch)
            out = nnx.merge(graphdef, state)(x, view, key=layer_key(mine, index))
            return out.x, out.router

        x, router = run_pipeline(remat(layer, self.config.remat), state, x, places, rules)
        return StackOutput(x, None, {}, router)


def layer_key(key: jax.Array | None, layer: jax.Array | int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, layer)


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
    """The same model with every Stack's layers apart, for generation; these share no memory with it."""
    model = nnx.clone(model)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, Stack) and not isinstance(module.layers, nnx.List):
            module.layers = nnx.List(module.blocks())
    return model
