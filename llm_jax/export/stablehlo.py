"""StableHLO through jax.export: functions that any later jax runs, on CPU, CUDA and TPU, without llm_jax.

    forward.stablehlo   the outputs of whole rows
    prefill.stablehlo   of decoders: prompts into a cache; encode.stablehlo where there is an encoder
    decode.stablehlo    one token further for each row
    model.safetensors   the parameters, an argument of each function
    manifest.json       arguments and results of each, in their order
    run.py              calls them, in a page of code; its tokenizer has vocabulary.safetensors

One artefact holds the program for all three platforms, for rows, lengths and caches of any size: see
export/functions.py.

What jax promises: an artefact can be read by every jax released within the six months after the one
that wrote it, and by those of the three weeks before (docs.jax.dev/en/latest/export/export.html).
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export.certificate import EXACT, Tolerances
from llm_jax.export.elsewhere import Elsewhere
from llm_jax.export.folder import new_folder
from llm_jax.export.functions import FAMILIES, PLATFORMS, Functions, Signature
from llm_jax.export.probes import Forward
from llm_jax.export.safetensors_file import Spec, tensor_kind, write_safetensors
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import NO_TOKENIZER, Vocabulary, vocabulary
from llm_jax.training.config import RunConfig, check_vocabulary

# Matrices and activations in bfloat16.
ROUNDED = Tolerances(
    difference=None, kl_divergence=1e-2, equal_tokens=0.9, nats=1e-2, elsewhere=3e-2
)


@dataclasses.dataclass(frozen=True)
class Config:
    """compute_dtype: of activations, the cache and matrices in the file."""

    name: str = "stablehlo"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


class StableHloExporter:
    """An Exporter for jax alone."""

    claims = (
        f"one artefact for {', '.join(PLATFORMS)}, of any batch, length and cache",
        "loaded without llm_jax and flax",
        "of a generator's rows the first half was computed by forward, the rest by decode and its cache",
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
          model: with its layers stacked, as training and `load_model` have them.
          directory: absent or empty.

        Raises:
          ConfigError: a model of another family, or a folder that is not empty.
        """
        with new_folder(directory) as folder:
            if config.model.name not in FAMILIES:
                raise ConfigError(
                    f"format stablehlo has no model {config.model.name!r}; choices: {', '.join(FAMILIES)}"
                )
            check_vocabulary(config, tokenizer.vocab_size)
            functions = FAMILIES[config.model.name](model, self.config.compute_dtype)
            described, signatures = {}, functions.signatures()
            for name, exported in functions.exported().items():
                (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
                described[name] = _description(exported, signatures[name])
            _write_parameters(folder / "model.safetensors", functions)
            words = self._vocabulary(tokenizer)
            outputs = [result["name"] for result in described["forward"]["results"]]
            given = self._given(functions, tokenizer, words, outputs)
            (folder / "run.py").write_text(compose("stablehlo_run", given), encoding="utf-8")
            if words is not None and words.tensors:
                _write_vocabulary(folder / "vocabulary.safetensors", words)
            _write_manifest(folder, functions, tokenizer, described)
        return Path(directory).resolve()

    def _vocabulary(self, tokenizer: Tokenizer) -> Vocabulary | None:
        try:
            return vocabulary(tokenizer)
        except ConfigError as error:
            self._say(f"run.py takes ids of tokens, not text: {error}")
            return None

    def _given(
        self,
        functions: Functions,
        tokenizer: Tokenizer,
        words: Vocabulary | None,
        outputs: Sequence[str],
    ) -> dict[str, Any]:
        """What the template of run.py asks."""
        config = functions.config
        given: dict[str, Any] = {
            "tokenizer": words is not None,
            "platforms": ", ".join(PLATFORMS[:-1]) + f" and {PLATFORMS[-1]}",
            "cache_dtype": self.config.compute_dtype,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "num_tokens": tokenizer.vocab_size,
            "max_length": config.max_length,
            "outputs": ", ".join(outputs),
            "decoder": config.name == "gpt",
            "encoder_decoder": config.name == "encoder_decoder",
            "encoder": config.name == "bert",
        }
        if config.name != "bert":
            layers = "num_layers" if config.name == "gpt" else "num_decoder_layers"
            shape = functions.cache_shape(*jax.export.symbolic_shape("batch_size, room"))
            letters = functions.cache_shape(*jax.export.symbolic_shape("B, C"))
            given |= {
                "num_layers": getattr(config, layers),
                "cache_shape": ", ".join(str(size).replace("*", " * ") for size in shape),
                "cache_letters": ", ".join(map(str, letters)),
            }
        return given | (words.given if words else NO_TOKENIZER)

    def load_back(self, directory: Path) -> Forward:
        """The exported model, in another process.

        The first half of a generator's row comes from `forward` and the rest from `decode`, token by token;
        with prompts the token between from `prefill`, behind some padding.
        """
        return Elsewhere("stablehlo", directory)

    def usage(self, directory: Path, name: str) -> str:
        return (
            "Without llm_jax, on CPU, CUDA or TPU:\n\n"
            "```\npip install jax flatbuffers safetensors\n"
            f'python {name}/run.py "Once upon a time"\n```\n\n'
            "`run.py` begins with the functions, `manifest.json` has their arguments one by one.\n"
        )


def make(config: Config | None = None, *, say: Callable[[str], None] = print) -> StableHloExporter:
    return StableHloExporter(config or Config(), say=say)


def require_flatbuffers() -> None:
    """Raises ConfigError where the package is missing in which jax writes its artefacts."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError('format stablehlo needs: pip install "llm_jax[stablehlo]"')


def _write_parameters(path: Path, functions: Functions) -> None:
    """Array by array: no more than one is in memory twice."""
    kinds = {"float32": "F32", "bfloat16": "BF16"}
    params = functions.params.items()
    specs = [Spec(name, kinds[x.dtype], x.view.shape) for name, x in params]
    arrays = (x.view.astype(x.dtype, copy=False) for _, x in params)
    write_safetensors(path, specs, arrays, {"format": "np"})


def _write_vocabulary(path: Path, words: Vocabulary) -> None:
    specs = [Spec(name, tensor_kind(x), x.shape) for name, x in words.tensors.items()]
    write_safetensors(path, specs, words.tensors.values(), {"format": "np"})


def _description(exported: jax.export.Exported, signature: Signature) -> dict[str, Any]:
    """Arguments and results, as flat as the program has them, in its order."""
    arguments, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    results = results if isinstance(results, tuple) else (results,)
    return {
        "arguments": _flat(dict(zip(("params", *signature.arguments), arguments, strict=True))),
        "results": _flat(dict(zip(signature.results, results, strict=True))),
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
    directory: Path, model: Functions, tokenizer: Tokenizer, functions: Mapping[str, Any]
) -> None:
    symbols = {"B": "rows", "T": "tokens", "S": "tokens of the encoder", "C": "places of the cache"}
    signatures = model.signatures().values()
    used = {symbol for signature in signatures for symbol in signature.symbols}
    content = {
        "format": "stablehlo",
        "jax_version": jax.__version__,
        "platforms": PLATFORMS,
        "params": "a dict of all arrays in model.safetensors",
        "symbols": {symbol: meaning for symbol, meaning in symbols.items() if symbol in used},
        "constraints": sorted({c for signature in signatures for c in signature.constraints}),
        "num_tokens": tokenizer.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "functions": functions,
    }
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    text = re.sub(r"\{\s+(\"name\"[^{}]*?)\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    (directory / "manifest.json").write_text(text + "\n", encoding="utf-8")
