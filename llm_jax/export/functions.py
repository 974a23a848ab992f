"""Models as pure functions of their parameters and of arrays, in any size: what export/stablehlo.py serializes.

Letters as everywhere, and as symbols of jax.export: B rows, T tokens, S tokens of an encoder, C >= T places of
a cache. Operations are those that all platforms have: the reference attention, `ragged_dot` for experts. A cache
goes in and out as arrays; where a row's tokens stand in it follows from numbers, how many it holds and how
many of them are padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.types import Model
from llm_jax.export import hf
from llm_jax.nn.attention import Memory
from llm_jax.nn.cache import KVCache
from llm_jax.nn.head import head_logits
from llm_jax.nn.mask import Places
from llm_jax.nn.precision import Precision, with_precision
from llm_jax.nn.transformer import unstack
from llm_jax.sharding.rules import path_name

PLATFORMS = ("cpu", "cuda", "tpu")

Arrays = dict[str, jax.Array]
Layers = dict[str, list[jax.Array]]  # "keys" and "values", of each layer [..., S, H]


@dataclasses.dataclass(frozen=True)
class Signature:
    """call: what is exported; arguments, behind params, and results: their names, in order.

    symbols: of the sizes; constraints: on them, as jax.export writes them.
    """

    call: Callable[..., Any]
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    symbols: str
    constraints: tuple[str, ...] = ()


class Stored(NamedTuple):
    """A parameter and what it is stored in."""

    view: np.ndarray
    dtype: str


class Functions:
    """A model of one family.

    params: by name, as they are stored; a layer's under `layers.3.`.
    """

    def __init__(self, model: Model, compute_dtype: str):
        self.config = model.config
        # As an accelerator computes it, and in operations that all platforms have.
        self.precision = Precision(compute_dtype, wide_output=False, attention_kernel="reference")
        apart = nnx.eval_shape(lambda: with_precision(unstack(model), self.precision))
        self._graphdef, state = nnx.split(apart)
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        variables = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
        self._treedef = jax.tree.structure(state)
        stacked = hf.params_of(model)
        self.params: dict[str, Stored] = {}
        for path, variable in variables:
            name, view = path_name(path), _of_layer(stacked, path_name(path))
            # As the engine keeps them: matrices in the compute dtype, but for routers and biases.
            cast = view.ndim > 1 and not {"router", None} & set(variable.axes)
            dtype = compute_dtype if cast else "float32"
            self.params[name.removeprefix("stack.")] = Stored(view, dtype)

    def signatures(self) -> dict[str, Signature]:
        raise NotImplementedError

    def shapes(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Of every argument of these functions, of int32 unless they are caches."""
        raise NotImplementedError

    def exported(self) -> dict[str, jax.export.Exported]:
        """Each function for all platforms and sizes."""
        result = {}
        params = {
            name: jax.ShapeDtypeStruct(x.view.shape, x.dtype) for name, x in self.params.items()
        }
        for name, signature in self.signatures().items():
            sizes = jax.export.symbolic_shape(
                ", ".join(signature.symbols), constraints=signature.constraints
            )
            possible = self.shapes(dict(zip(signature.symbols, sizes, strict=True)))
            arguments = [possible[argument] for argument in signature.arguments]
            call = jax.jit(signature.call)
            result[name] = jax.export.export(call, platforms=PLATFORMS)(params, *arguments)
        return result

    def _model(self, params: Arrays) -> Model:
        leaves = [params[name] for name in self.params]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def cache_shape(self, batch_size: Any, capacity: Any) -> tuple[Any, ...]:
        """Of the keys of a layer, and of its values."""
        config = self.config
        make = functools.partial(
            KVCache.empty, num_layers=1, batch_size=batch_size, max_length=capacity,
            num_kv_heads=getattr(config, "num_kv_heads", config.num_heads),
            head_dim=config.head_dim, dtype=self.precision.dtype,
        )  # fmt: skip
        return jax.eval_shape(make).keys[0].shape

    def _layers(self, num_layers: int, shape: tuple[Any, ...]) -> dict[str, Any]:
        each = [jax.ShapeDtypeStruct(shape, self.precision.dtype)] * num_layers
        return {"keys": each, "values": each}

    def _last_logits(self, out) -> jax.Array:
        """[B, V], of the last token alone."""
        return head_logits(self.precision, out.hidden[:, -1:], out.head)[:, 0]


class Decoder(Functions):
    """GPT. Prompts of different lengths are padded on the left: `padding` counts those tokens."""

    def signatures(self) -> dict[str, Signature]:
        within = f"T <= {self.config.max_length}"
        step = ("logits", "cache")
        return {
            "forward": Signature(self.forward, ("tokens",), ("logits",), "BT", (within,)),
            "prefill": Signature(
                self.prefill, ("tokens", "padding", "cache"), step, "BTC", ("C >= T", within)
            ),
            "decode": Signature(self.decode, ("token", "padding", "length", "cache"), step, "BC"),
        }

    def shapes(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        config, b = self.config, sizes["B"]
        return {
            "tokens": _int32(b, sizes.get("T")),
            "token": _int32(b),
            "padding": _int32(b),
            "length": _int32(),
            "cache": self._layers(config.num_layers, self.cache_shape(b, sizes.get("C", 1))),
        }

    def forward(self, params: Arrays, tokens: jax.Array) -> jax.Array:
        """tokens: [B, T] int32 to logits [B, T, V] float32."""
        return self._model(params)({"tokens": tokens}).logits

    def prefill(
        self, params: Arrays, tokens: jax.Array, padding: jax.Array, cache: Layers
    ) -> tuple[jax.Array, Layers]:
        """Logits [B, V] of the last of tokens [B, T], whose first padding [B] are none, and the cache."""
        length = tokens.shape[1]
        places = _places(jnp.arange(length, dtype=jnp.int32), padding, length)
        return self._step(params, tokens, places, padding, jnp.int32(0), cache)

    def decode(
        self, params: Arrays, token: jax.Array, padding: jax.Array, length: jax.Array, cache: Layers
    ) -> tuple[jax.Array, Layers]:
        """Logits [B, V] of token [B] behind the `length` ones in the cache."""
        places = _places(length[None], padding, length + 1)
        return self._step(params, token[:, None], places, padding, length, cache)

    def _step(self, params, tokens, places: Places, padding, length, cache: Layers):
        held = _places(_all(cache["keys"][0].shape[-2]), padding, length)
        state = KVCache(tuple(cache["keys"]), tuple(cache["values"]), held, length)
        batch = {"tokens": tokens, "positions": places.positions, "segment_ids": places.segment_ids}
        out = self._model(params)(batch, cache=state)
        return self._last_logits(out), _as_layers(out.cache.keys, out.cache.values)


class EncoderDecoder(Functions):
    """T5 and the Transformer of 2017. Rows of the encoder are padded on the right."""

    def signatures(self) -> dict[str, Signature]:
        most = self.config.max_length
        return {
            "forward": Signature(
                self.forward,
                ("encoder_tokens", "encoder_length", "tokens"),
                ("logits",),
                "BST",
                (f"S <= {most}", f"T <= {most}"),
            ),
            "encode": Signature(
                self.encode,
                ("encoder_tokens", "encoder_length"),
                ("memory",),
                "BS",
                (f"S <= {most}",),
            ),
            "decode": Signature(
                self.decode,
                ("token", "length", "encoder_length", "memory", "cache"),
                ("logits", "cache"),
                "BSC",
            ),
        }

    def shapes(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        config, b = self.config, sizes["B"]
        seen = (b, config.num_heads, sizes.get("S", 1), config.head_dim)
        return {
            "encoder_tokens": _int32(b, sizes.get("S")),
            "encoder_length": _int32(b),
            "tokens": _int32(b, sizes.get("T")),
            "token": _int32(b),
            "length": _int32(),
            "memory": self._layers(config.num_decoder_layers, seen),
            "cache": self._layers(
                config.num_decoder_layers, self.cache_shape(b, sizes.get("C", 1))
            ),
        }

    def forward(
        self,
        params: Arrays,
        encoder_tokens: jax.Array,
        encoder_length: jax.Array,
        tokens: jax.Array,
    ) -> jax.Array:
        """Logits [B, T, V] of tokens [B, T] that begin with pad, for encoder_tokens [B, S]."""
        seen = _right_padded(encoder_length, encoder_tokens.shape[1])
        batch = {"encoder_tokens": encoder_tokens, "encoder_segment_ids": seen.segment_ids}
        return self._model(params)({"tokens": tokens, **batch}).logits

    def encode(
        self, params: Arrays, encoder_tokens: jax.Array, encoder_length: jax.Array
    ) -> Layers:
        """What each layer of the decoder attends to, of encoder_tokens [B, S]."""
        seen = _right_padded(encoder_length, encoder_tokens.shape[1])
        model = self._model(params)
        batch = {"encoder_tokens": encoder_tokens, "encoder_segment_ids": seen.segment_ids}
        memory: Memory = model.encode(batch)
        return _as_layers(*model.decoder.memory_keys_values(memory))

    def decode(
        self,
        params: Arrays,
        token: jax.Array,
        length: jax.Array,
        encoder_length: jax.Array,
        memory: Layers,
        cache: Layers,
    ) -> tuple[jax.Array, Layers]:
        """Logits [B, V] of token [B] behind the `length` ones in the cache; the first one is pad."""
        none = jnp.zeros_like(token)
        state = KVCache(
            tuple(cache["keys"]),
            tuple(cache["values"]),
            _places(_all(cache["keys"][0].shape[-2]), none, length),
            length,
            tuple(memory["keys"]),
            tuple(memory["values"]),
            _right_padded(encoder_length, memory["keys"][0].shape[-2]),
        )
        places = _places(length[None], none, length + 1)
        batch = {"positions": places.positions, "segment_ids": places.segment_ids}
        out = self._model(params)({"tokens": token[:, None], **batch}, cache=state)
        return self._last_logits(out), _as_layers(out.cache.keys, out.cache.values)


class Encoder(Functions):
    """BERT and RoBERTa. Rows are padded on the right."""

    def signatures(self) -> dict[str, Signature]:
        within = f"T <= {self.config.max_length}"
        names = ("tokens", "token_types", "length")
        return {"forward": Signature(self.forward, names, ("outputs",), "BT", (within,))}

    def shapes(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        b, t = sizes["B"], sizes["T"]
        return {"tokens": _int32(b, t), "token_types": _int32(b, t), "length": _int32(b)}

    def forward(
        self, params: Arrays, tokens: jax.Array, token_types: jax.Array, length: jax.Array
    ) -> Arrays:
        """Of tokens [B, T]: logits [B, T, V], class_logits [B, C], or hidden [B, T, D] without a head."""
        seen = _right_padded(length, tokens.shape[1])
        batch = {"tokens": tokens, "token_types": token_types, "segment_ids": seen.segment_ids}
        out = self._model(params)(batch)
        found = {"logits": out.logits, "class_logits": out.class_logits}
        found = {name: x for name, x in found.items() if x is not None} or {"hidden": out.hidden}
        return {name: x.astype(jnp.float32) for name, x in found.items()}


FAMILIES: Mapping[str, type[Functions]] = {
    "gpt": Decoder,
    "encoder_decoder": EncoderDecoder,
    "bert": Encoder,
}


def _of_layer(stacked: hf.Params, name: str) -> np.ndarray:
    """A view of "stack.layers.3.mlp.up" in the array "stack.layers.mlp.up" of all layers."""
    if name in stacked:
        return stacked[name]
    stack, inner = name.split(".layers.")
    layer, inner = inner.split(".", 1)
    return stacked[f"{stack}.layers.{inner}"][int(layer)]


def _int32(*shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _all(count: Any) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


def _places(at: jax.Array, padding: jax.Array, length: jax.Array | int) -> Places:
    """Of the places `at` [S] in rows that begin with padding [B] and hold `length` tokens."""
    positions = at[None] - padding[:, None]
    segment_ids = jnp.where(at[None] < length, (positions >= 0).astype(jnp.int32), -1)
    return Places(segment_ids, jnp.maximum(positions, 0))


def _right_padded(length: jax.Array, width: Any) -> Places:
    """Of rows [B, width] of which the first length [B] tokens are real."""
    positions = jnp.broadcast_to(_all(width), (length.shape[0], width))
    return Places((positions < length[:, None]).astype(jnp.int32), positions)


def _as_layers(keys, values) -> Layers:
    return {"keys": list(keys), "values": list(values)}
