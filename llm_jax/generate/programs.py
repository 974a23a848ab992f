"""What of generation runs on the device: the model's own copy of the parameters, and the programs over it.

The parameters are copied where they are needed otherwise: layers apart, since slicing a stacked parameter
costs a copy of it per token, and matrices in the compute dtype, since they are then read in half the time. The
others are the caller's own arrays, which must live as long. On CPU it computes in float32
whatever the model was trained in: see Precision.for_generation.

Programs have static shapes: rows and places of a cache are powers of two, so there are few of each. A step
takes the cache that it changes as a donation, and none waits for the host; while a cache gets another size, it
and the new one are both in memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core.types import Model
from llm_jax.generate.beam import BeamConfig, Beams, search
from llm_jax.generate.sampler import Sampling, SamplingMethod, draw
from llm_jax.nn.cache import KVCache, by_heads
from llm_jax.nn.mask import Places
from llm_jax.nn.precision import with_precision
from llm_jax.nn.transformer import unstack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a step knows of its rows, [B] each: those that are free have segment 0.

    tokens, positions: int32, of the token that the step takes; index: uint32, of the one it draws.
    seeds, numbers: uint32, of the row's randomness; seen: [B, V] bool where a penalty wants it.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    index: jax.Array
    seeds: jax.Array
    numbers: jax.Array
    sampling: Sampling
    seen: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """A step's result: tokens, log_probabilities [B]; the k best: ids, log probabilities [B, k], or None."""

    tokens: jax.Array
    log_probabilities: jax.Array
    best_tokens: jax.Array | None
    best_log_probabilities: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
    """Keys and values of tokens by themselves: one [tokens, K, H] per layer."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Programs:
    """All programs of one model; `vocab_size` is the tokenizer's.

    Those of two models that differ in their parameters alone are compiled once: in a training loop, which
    generates with other parameters each time.

    Args:
      max_position: the last that the model has, where rows that have ended stay.
    """

    def __init__(self, model: Model, vocab_size: int, max_position: int):
        self.vocab_size, self.has_encoder = vocab_size, hasattr(model, "encode")
        model = with_precision(unstack(model), model.precision.for_generation())
        if model.precision.wide_output:
            _head_apart(model)
        graphdef, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(_cast(state, model.precision.dtype))
        keys_sharding = _keys_sharding(state)
        compiled = _Compiled(graphdef, treedef, keys_sharding, vocab_size, max_position)
        of_model = lambda function: functools.partial(function, leaves)  # noqa: E731
        self.empty_cache = of_model(compiled.empty_cache)
        self.encode = of_model(compiled.encode)
        self.fill = of_model(compiled.fill)
        self.step = of_model(compiled.step)
        self.search = of_model(compiled.search)
        self.draw, self.load = compiled.draw, compiled.load
        self.with_row, self.of_rows = compiled.with_row, compiled.of_rows
        self.emptied, self.ring_resized = compiled.emptied, compiled.ring_resized
        self.memory_grown = compiled.memory_grown
        self.empty_store, self.save = compiled.empty_store, _save


# A process has a few models at once; the programs of those long gone are given up.
@functools.lru_cache(maxsize=8)
class _Compiled:
    """Jitted functions of a model without its parameters, which they get as `leaves`."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        treedef: jax.tree_util.PyTreeDef,
        keys_sharding: NamedSharding | None,
        vocab_size: int,
        max_position: int,
    ):
        self._graphdef, self._treedef = graphdef, treedef
        self._keys_sharding = keys_sharding
        self._vocab_size, self._max_position = vocab_size, max_position
        self.empty_cache = self._jit(self._empty_cache, static_argnums=(1, 2))
        self.encode = self._jit(self._encode, static_argnums=2)
        self.fill = self._jit(self._fill, donate_argnums=1, static_argnames="scored")
        self.step = self._jit(self._step, donate_argnums=1)
        self.search = jax.jit(self._search, static_argnums=(4, 5, 6))
        self.draw = jax.jit(self._draw, donate_argnums=1, static_argnames=("method", "num_best"))
        self.with_row = self._jit(KVCache.with_row, donate_argnums=0)
        self.of_rows = self._jit(lambda cache, rows: cache.of_rows(lambda a: a[rows]))
        self.ring_resized = self._jit(KVCache.ring_resized, static_argnums=1)
        self.memory_grown = self._jit(KVCache.memory_grown, static_argnums=1)
        self.emptied = self._jit(KVCache.emptied, static_argnums=(1, 2, 3))
        self.empty_store = jax.jit(self._empty_store, static_argnums=1)
        self.load = self._jit(_load)

    def _model(self, leaves: list[jax.Array]) -> Model:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _next_logits(self, leaves, tokens, positions, segment_ids, cache):
        """tokens, positions, segment_ids: [B, 1] to logits [B, V] of the tokenizer's ids, and the cache."""
        batch = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
        out = self._model(leaves)(batch, cache=cache)
        # A vocabulary padded for the mesh has ids that mean nothing.
        return out.logits[:, -1, : self._vocab_size], out.cache

    def _jit(self, function, **arguments):
        """jit, whose caches lie on the mesh as the model's heads do."""

        @functools.wraps(function)
        def pinned(*args, **kwargs):
            return jax.tree.map(
                lambda a: self._pinned(a) if isinstance(a, KVCache) else a,
                function(*args, **kwargs),
                is_leaf=lambda a: isinstance(a, KVCache),
            )

        return jax.jit(pinned, **arguments)

    def _pinned(self, cache: KVCache) -> KVCache:
        if self._keys_sharding is None:
            return cache
        names = ("keys", "values")
        pin = lambda a: jax.lax.with_sharding_constraint(a, self._keys_sharding)  # noqa: E731
        return dataclasses.replace(
            cache, **{name: jax.tree.map(pin, getattr(cache, name)) for name in names}
        )

    def _empty_cache(self, leaves, batch_size: int, max_length: int) -> KVCache:
        return self._model(leaves).init_cache(batch_size, max_length)

    def _encode(self, leaves, batch: dict[str, jax.Array], size: int) -> KVCache:
        model = self._model(leaves)
        return model.start(model.encode(batch), size)

    def _fill(
        self, leaves, cache: KVCache, batch: dict[str, jax.Array], *, scored: bool = False
    ) -> tuple[KVCache, jax.Array | None]:
        """Appends tokens; where `scored`, log probabilities [B, T] of batch["targets"] behind them, too."""
        out = self._model(leaves)(batch, cache=cache)
        if not scored:
            return out.cache, None
        logits = out.logits[..., : self._vocab_size]
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return out.cache, chosen - jax.nn.logsumexp(logits, axis=-1)

    def _step(self, leaves, cache: KVCache, rows: Rows) -> tuple[KVCache, jax.Array]:
        """The ring of keys takes one token of each row; returns the logits behind them, [B, V]."""
        column = lambda a: a[:, None]  # noqa: E731
        logits, cache = self._next_logits(
            leaves, column(rows.tokens), column(rows.positions), column(rows.segment_ids), cache
        )
        size = cache.places.positions.shape[1]
        return dataclasses.replace(cache, length=cache.length % size), logits

    def _search(
        self,
        leaves,
        cache: KVCache,
        tokens,
        positions,
        config: BeamConfig,
        eos_id: int,
        pad_id: int,
    ) -> tuple[Beams, Beams]:
        """Beam search from the last tokens of prompts, [B, 1] and their positions: see `search`."""

        def next_logits(tokens, positions, cache):
            return self._next_logits(leaves, tokens, positions, jnp.ones_like(tokens), cache)

        return search(next_logits, config, cache, tokens, positions, eos_id=eos_id, pad_id=pad_id)

    def _draw(
        self, logits: jax.Array, rows: Rows, *, method: SamplingMethod, num_best: int
    ) -> tuple[Rows, Drawn]:
        keys = None
        if method.drawn:
            of_row = lambda seed, number, index: jax.random.fold_in(  # noqa: E731
                jax.random.fold_in(jax.random.key(seed), number), index
            )
            keys = jax.vmap(of_row)(rows.seeds, rows.numbers, rows.index)
        tokens, log_probabilities = draw(logits, keys, rows.sampling, method, rows.seen)
        best = best_tokens = None
        if num_best:
            best, best_tokens = jax.lax.top_k(logits, num_best)
            best -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        seen = rows.seen
        if seen is not None:
            seen |= jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool)
        rows = dataclasses.replace(
            rows,
            tokens=tokens,
            # A row that has ended runs on, unread, beside those that have not.
            positions=jnp.minimum(rows.positions + 1, self._max_position),
            index=rows.index + 1,
            seen=seen,
        )
        return rows, Drawn(tokens, log_probabilities, best_tokens, best)

    def _empty_store(self, cache: KVCache, tokens: int) -> Store:
        heads = lambda a: a.shape[0] // cache.num_rows  # noqa: E731
        make = lambda a: jnp.zeros((tokens, heads(a), a.shape[2]), a.dtype)  # noqa: E731
        return Store(*jax.tree.map(make, (cache.keys, cache.values)))


@jax.jit
def next_rows(rows: Rows, old: Rows | None, source: jax.Array) -> Rows:
    """`rows` with what only the device knows, for rows that come from the row `source` >= 0 of `old`.

    That is the last token drawn, and which tokens were seen.
    """
    if old is None:
        return rows
    stays, source = source >= 0, jnp.maximum(source, 0)
    seen = rows.seen
    if seen is not None and old.seen is not None:
        seen = jnp.where(stays[:, None], old.seen[source], seen)
    return dataclasses.replace(
        rows, tokens=jnp.where(stays, old.tokens[source], rows.tokens), seen=seen
    )


@functools.partial(jax.jit, donate_argnums=0)
def _save(
    store: Store, cache: KVCache, row: jax.Array, columns: jax.Array, targets: jax.Array
) -> Store:
    """Copies the tokens at `columns` of a row to places of the store; both [W] int32, targets past its end drop."""

    def put(old, a):
        tokens = jnp.take(cache.by_rows(a)[:, row], columns, axis=1)  # [K, W, H]
        tokens = jnp.swapaxes(tokens, 0, 1)
        return old.at[targets].set(tokens, mode="drop", unique_indices=True)

    return Store(*jax.tree.map(put, (store.keys, store.values), (cache.keys, cache.values)))


def _load(store: Store, cache: KVCache, places: jax.Array, length: jax.Array) -> KVCache:
    """Tokens of the store as the beginning of an empty cache.

    Args:
      places: [B, S] int32 in the store of the row's first tokens; -1 where none stands.
      length: where the next tokens go, behind the longest of these.
    """
    found = places >= 0
    get = lambda a: by_heads(a[jnp.maximum(places, 0)])  # noqa: E731
    keys, values = jax.tree.map(get, (store.keys, store.values))
    columns = jnp.broadcast_to(jnp.arange(places.shape[1]), places.shape)
    stands = Places(jnp.where(found, 1, -1), columns)
    return dataclasses.replace(cache, keys=keys, values=values, places=stands, length=length)


def _cast(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Matrices in `dtype`. Norms compute in float32 with their one-dimensional scales, routers and relative
    biases with their tables.
    """

    def cast(variable: nnx.Variable) -> nnx.Variable:
        keep = variable[...].ndim < 2 or {"router", None} & set(variable.axes)
        return variable if keep else variable.replace(variable[...].astype(dtype))

    return jax.tree.map(cast, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _head_apart(model: Model) -> None:
    """A tied head by itself, since a CPU multiplies a few rows faster with [D, V] than with [V, D]."""
    if hasattr(model, "init_cache") and model.config.tie_embeddings:
        model.head = nnx.Param(model.embed[...].T, axes=("embed", "vocab"))
        model.config = dataclasses.replace(model.config, tie_embeddings=False)


def _keys_sharding(state: nnx.State) -> NamedSharding | None:
    """Of keys [K * B, S, H]: heads over the mesh axes over which those of the parameters lie."""
    variables: list[Any] = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    for variable in variables:
        sharding = variable[...].sharding
        if "kv_heads" in variable.axes and isinstance(sharding, NamedSharding):
            axes = variable.axes[-variable[...].ndim :]  # of a layer, those of the stack
            spec = (*sharding.spec, *[None] * len(axes))
            heads = spec[axes.index("kv_heads")]
            return NamedSharding(sharding.mesh, PartitionSpec(heads))
    return None
