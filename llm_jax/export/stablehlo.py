"""StableHLO through jax.export: functions that any later jax runs, on CPU, CUDA and TPU, without llm_jax.

    forward.stablehlo, prefill.stablehlo, decode.stablehlo   batch, length and cache may be of any size
    model.safetensors   the parameters, an argument of each function
    manifest.json       arguments and results of each, in their order
    run.py              generates, in a page of code; its tokenizer has vocabulary.safetensors

One artefact holds the program for all three platforms, hence plain operations throughout: the reference
attention, `ragged_dot` for experts. The cache goes in and out as arrays, and where a row's tokens stand
follows from two numbers, how many the cache holds and how many of them are padding.

What jax promises: an artefact can be read by every jax released within the six months after the one
that wrote it, and by those of the three weeks before (docs.jax.dev/en/latest/export/export.html).
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export.certificate import EXACT, Tolerances
from llm_jax.export.elsewhere import Elsewhere
from llm_jax.export.folder import new_folder
from llm_jax.export.probes import Forward
from llm_jax.export.safetensors_file import Spec, tensor_kind, write_safetensors
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import NO_TOKENIZER, Vocabulary, vocabulary
from llm_jax.nn.cache import KVCache
from llm_jax.nn.head import head_logits
from llm_jax.nn.mask import Places
from llm_jax.nn.precision import Precision, with_precision
from llm_jax.nn.transformer import unstack
from llm_jax.sharding.rules import path_name
from llm_jax.training.config import RunConfig, check_vocabulary

PLATFORMS = ("cpu", "cuda", "tpu")
ARGUMENTS = {
    "forward": "params tokens",
    "prefill": "params tokens padding cache",
    "decode": "params tokens padding length cache",
}

# Matrices and activations in bfloat16.
ROUNDED = Tolerances(difference=None, kl_divergence=1e-2, equal_tokens=0.9, nats=1e-2)

Arrays = dict[str, jax.Array]
Cache = dict[str, list[jax.Array]]  # "keys" and "values": of each layer [B, K, C, H]


@dataclasses.dataclass(frozen=True)
class Config:
    """compute_dtype: of activations, the cache and matrices in the file."""

    name: str = "stablehlo"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


class StableHloExporter:
    """An Exporter of decoders for jax alone."""

    claims = (
        f"one artefact for {', '.join(PLATFORMS)}, of any batch, length and cache",
        "loaded without llm_jax and flax",
        "of each row the first half was computed by forward, the rest by prefill and decode",
    )
    library = None

    def __init__(self, config: Config, *, say: Callable[[str], None] = print):
        require_flatbuffers()
        self.config, self._say = config, say
        self.tolerances = EXACT if config.compute_dtype == "float32" else ROUNDED

    def export(
        self, model: Model, tokenizer: Tokenizer, config: RunConfig, directory: Path
    ) -> Path:
        """Writes the folder.

        Args:
          model: with its layers stacked or apart.
          directory: absent or empty.

        Raises:
          ConfigError: no decoder, or a folder that is not empty.
        """
        with new_folder(directory) as folder:
            if config.model.name != "gpt":
                raise ConfigError(
                    f"format stablehlo has no model {config.model.name!r}; choices: gpt (all decoders), "
                    "or --format hf for every model"
                )
            check_vocabulary(config, tokenizer.vocab_size)
            functions = Functions(model, self.config.compute_dtype)
            described = {}
            for name, exported in functions.exported().items():
                (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
                described[name] = _description(exported, ARGUMENTS[name])
            _write_tensors(folder / "model.safetensors", functions.params)
            words = self._vocabulary(tokenizer)
            given = self._given(model, tokenizer, words)
            (folder / "run.py").write_text(compose("stablehlo_run", given), encoding="utf-8")
            if words is not None and words.tensors:
                _write_tensors(folder / "vocabulary.safetensors", words.tensors)
            _write_manifest(folder, model, tokenizer, described)
        return Path(directory).resolve()

    def _vocabulary(self, tokenizer: Tokenizer) -> Vocabulary | None:
        try:
            return vocabulary(tokenizer)
        except ConfigError as error:
            self._say(f"run.py takes ids of tokens, not text: {error}")
            return None

    def _given(
        self, model: Model, tokenizer: Tokenizer, words: Vocabulary | None
    ) -> dict[str, Any]:
        """What the template of run.py asks."""
        given: dict[str, Any] = {
            "tokenizer": words is not None,
            "platforms": ", ".join(PLATFORMS[:-1]) + f" and {PLATFORMS[-1]}",
            "cache_dtype": self.config.compute_dtype,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "num_tokens": tokenizer.vocab_size,
        }
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_length"):
            given[name] = getattr(model.config, name)
        return given | (words.given if words else NO_TOKENIZER)

    def load_back(self, directory: Path) -> Forward:
        """The exported model, in another process.

        The first half of a row comes from `forward`, its last token from `prefill` behind some padding,
        and the rest from `decode`, token by token.
        """
        return Elsewhere("stablehlo", directory)

    def usage(self, directory: Path, name: str) -> str:
        return (
            "Without llm_jax, on CPU, CUDA or TPU:\n\n"
            "```\npip install jax flatbuffers safetensors\n"
            f'python {name}/run.py "Once upon a time" --max_tokens 100\n```\n\n'
            "`run.py` begins with the functions, `manifest.json` has their arguments one by one.\n"
        )


def make(config: Config | None = None, *, say: Callable[[str], None] = print) -> StableHloExporter:
    return StableHloExporter(config or Config(), say=say)


def require_flatbuffers() -> None:
    """Raises ConfigError where the package is missing in which jax writes its artefacts."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError('format stablehlo needs: pip install "llm_jax[stablehlo]"')


class Functions:
    """A decoder as pure functions of its parameters.

    params: by name, as they are stored; a layer's under `layers.3.`.
    """

    def __init__(self, model: Model, compute_dtype: str):
        self.config = model.config
        # As an accelerator computes it, and in operations that all platforms have.
        precision = Precision(compute_dtype, wide_output=False, attention_kernel="reference")
        self._precision = precision
        model = with_precision(unstack(model), precision)
        self._graphdef, state = nnx.split(model)
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        variables = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
        self._treedef = jax.tree.structure(state)
        self.params = {
            path_name(path).removeprefix("stack."): _stored(variable, compute_dtype)
            for path, variable in variables
        }

    def _model(self, params: Arrays) -> Model:
        leaves = [params[name] for name in self.params]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def forward(self, params: Arrays, tokens: jax.Array) -> jax.Array:
        """tokens: [B, T] int32 to logits [B, T, V] float32."""
        return self._model(params)({"tokens": tokens}).logits

    def prefill(
        self, params: Arrays, tokens: jax.Array, padding: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, V] of the last of tokens [B, T], whose first padding [B] are none, and the cache."""
        length = tokens.shape[1]
        places = _places(jnp.arange(length, dtype=jnp.int32), padding, length)
        return self._step(params, tokens, places, padding, jnp.int32(0), cache)

    def decode(
        self, params: Arrays, tokens: jax.Array, padding: jax.Array, length: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, V] of tokens [B] behind the `length` ones in the cache."""
        places = _places(length[None], padding, length + 1)
        return self._step(params, tokens[:, None], places, padding, length, cache)

    def _step(self, params, tokens, places: Places, padding, length, cache: Cache):
        model = self._model(params)
        capacity = jnp.arange(cache["keys"][0].shape[2], dtype=jnp.int32)
        state = KVCache(
            tuple(cache["keys"]), tuple(cache["values"]), _places(capacity, padding, length), length
        )
        batch = {"tokens": tokens, "positions": places.positions, "segment_ids": places.segment_ids}
        out = model(batch, cache=state)
        logits = head_logits(self._precision, out.hidden[:, -1:], out.head)[:, 0]
        return logits, {"keys": list(out.cache.keys), "values": list(out.cache.values)}

    def exported(self) -> dict[str, jax.export.Exported]:
        """Each function for all platforms and sizes."""
        within = f"T <= {self.config.max_length}"
        given = {
            "forward": self._arguments("forward", "B, T", [within]),
            "prefill": self._arguments("prefill", "B, T, C", ["C >= T", within]),
            "decode": self._arguments("decode", "B, C", []),
        }
        return {
            name: jax.export.export(jax.jit(getattr(self, name)), platforms=PLATFORMS)(*arguments)
            for name, arguments in given.items()
        }

    def _arguments(self, function: str, symbols: str, constraints: list[str]) -> list[Any]:
        """The shapes of a function's arguments; each function has symbols of its own."""
        config = self.config
        sizes = jax.export.symbolic_shape(symbols, constraints=constraints)
        size = dict(zip(symbols.split(", "), sizes, strict=True))
        shape = lambda *dims, dtype=jnp.int32: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
        kept = (size["B"], config.num_kv_heads, size.get("C"), config.head_dim)
        keys = [shape(*kept, dtype=self._precision.dtype)] * config.num_layers
        possible = {
            "params": {name: shape(*x.shape, dtype=x.dtype) for name, x in self.params.items()},
            "tokens": shape(size["B"], size["T"]) if "T" in size else shape(size["B"]),
            "padding": shape(size["B"]),
            "length": shape(),
            "cache": {"keys": keys, "values": keys},
        }
        return [possible[name] for name in ARGUMENTS[function].split()]


def _write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    specs = [Spec(name, tensor_kind(x), x.shape) for name, x in arrays.items()]
    write_safetensors(path, specs, arrays.values(), {"format": "np"})


def _stored(variable: nnx.Variable, dtype: str) -> np.ndarray:
    """Matrices in the compute dtype, as the engine keeps them, but for routers."""
    x = np.asarray(variable[...])
    cast = x.ndim > 1 and not {"router", None} & set(variable.axes)
    return np.ascontiguousarray(x.astype(dtype) if cast else x)


def _places(at: jax.Array, padding: jax.Array, length: jax.Array | int) -> Places:
    """Of the places `at` [S] in rows that begin with padding [B] and hold `length` tokens."""
    positions = at[None] - padding[:, None]
    segment_ids = jnp.where(at[None] < length, (positions >= 0).astype(jnp.int32), -1)
    return Places(segment_ids, jnp.maximum(positions, 0))


def _description(exported: jax.export.Exported, names: str) -> dict[str, Any]:
    """Arguments and results, as flat as the program has them, in its order."""
    arguments, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    results = results if isinstance(results, tuple) else (results,)
    return {
        "arguments": _flat(dict(zip(names.split(), arguments, strict=True))),
        "results": _flat(dict(zip(("logits", "cache"), results, strict=False))),
        "calling_convention_version": exported.calling_convention_version,
    }


def _flat(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name + jax.tree_util.keystr(path),
            "shape": [n if isinstance(n, int) else str(n) for n in x.shape],
            "dtype": x.dtype.name,
        }
        for name, value in values.items()
        for path, x in jax.tree_util.tree_leaves_with_path(value)
    ]


def _write_manifest(
    directory: Path, model: Model, tokenizer: Tokenizer, functions: Mapping[str, Any]
) -> None:
    content = {
        "format": "stablehlo",
        "jax_version": jax.__version__,
        "platforms": PLATFORMS,
        "params": "a dict of all arrays in model.safetensors",
        "symbols": {"B": "rows", "T": "tokens", "C": "places of the cache, at least T"},
        "max_length": model.config.max_length,
        "num_tokens": tokenizer.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "functions": functions,
    }
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    text = re.sub(r"\{\s+(\"name\"[^{}]*?)\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    (directory / "manifest.json").write_text(text + "\n", encoding="utf-8")
