"""Two files: model.safetensors, and run.py, which needs Python and numpy only and reads like a textbook.

run.py is composed for the model at hand (standalone/run.py is the template): one that has no experts has no
line about experts. The parameters keep our names, layers apart, each matrix as `x @ matrix` wants it.

The export is run by another process that can import nothing but the standard library and numpy:
`load_back` gives its logits, half of them from its cache, and its tokenizer is compared with ours.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export import hf
from llm_jax.export.certificate import EXACT, Tolerances
from llm_jax.export.elsewhere import Elsewhere
from llm_jax.export.folder import new_folder
from llm_jax.export.probes import Forward
from llm_jax.export.safetensors_file import DTYPES, Spec, tensor_kind, write_safetensors
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import Vocabulary, vocabulary
from llm_jax.models import gpt
from llm_jax.training.config import RunConfig, check_vocabulary

WEIGHTS, PROGRAM = "model.safetensors", "run.py"
# Texts that tokenizers disagree on, if on any.
PROBES = (
    "",
    " ",
    "def f(x):\n    return  x\r\n\n\t# end  ",
    " one  two Three, it's 1234567 don 't. We'LL \u017fee ",
    "中文字符 测试，标点。 é e\u0301 ﬁ Ａ İı ß ǅ ʰ 𝟗 ½ Ⅷ ٣",
    "😀👨‍👩‍👧 \U0010ffff \ufeffx \u00a0\u2028\u0085 \u3000 \u1680.\u200b",
    "\x00\x01\x1c\x1d \x1f\x7f <s></s><unk><pad><|endoftext|><0x41><0xE4> [MASK]",
    "▁ x▁▁y ▁",
    "aaaaaaa ======== \n \n  \n   ",
)


# Matrices in 16 bits.
ROUNDED = Tolerances(difference=None, kl_divergence=1e-3, equal_tokens=0.95, nats=5e-3)


@dataclasses.dataclass(frozen=True)
class Config:
    """dtype: of matrices in the file; run.py computes in float32 whatever it is."""

    name: str = "bundle"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class BundleExporter:
    """An Exporter of decoders for Python with numpy."""

    claims = (
        "run.py imports numpy and the standard library alone",
        f"its tokenizer cuts {len(PROBES)} awkward texts as ours does",
        "the second half of each row was computed token by token, from its cache",
    )
    library = None

    def __init__(self, config: Config, *, say: Callable[[str], None] = print):
        self.config, self._say = config, say
        self.tolerances = EXACT if config.dtype == "float32" else ROUNDED

    def export(
        self, model: Model, tokenizer: Tokenizer, config: RunConfig, directory: Path
    ) -> Path:
        """Writes both files.

        Args:
          model: with its layers stacked, as training and `load_model` have them.
          directory: absent or empty.

        Raises:
          ConfigError: no decoder, a tokenizer that plain Python cannot follow, or a folder that is
            not empty.
          RunError: run.py fails, or cuts a text otherwise.
        """
        with new_folder(directory) as folder:
            if config.model.name != "gpt":
                raise ConfigError(
                    f"format bundle has no model {config.model.name!r}; choices: gpt (all decoders), "
                    "or --format hf for every model"
                )
            check_vocabulary(config, tokenizer.vocab_size)
            words = vocabulary(tokenizer)
            params = hf.params_of(model)
            count = sum(x.size for x in params.values())
            text = program(config.model, tokenizer, words, count)
            (folder / PROGRAM).write_text(text, encoding="utf-8")
            self._write_tensors(folder / WEIGHTS, params, words)
            _check_tokenizer(folder, tokenizer)
        return Path(directory).resolve()

    def _write_tensors(self, path: Path, params: hf.Params, words: Vocabulary) -> None:
        """Matrix by matrix: no more than one is in memory twice."""
        kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
        stored = {
            name: Stored(name, x, kinds[self.config.dtype]) for name, x in layers_apart(params)
        }
        tensors = {name: (tensor_kind(x), x) for name, x in words.tensors.items()}
        specs = [Spec(name, x.kind, x.shape) for name, x in stored.items()]
        specs += [Spec(name, kind, x.shape) for name, (kind, x) in tensors.items()]
        arrays = itertools.chain(
            (x.array() for x in stored.values()), (x for _, x in tensors.values())
        )
        write_safetensors(path, specs, arrays, {"format": "np"})

    def load_back(self, directory: Path) -> Forward:
        """The exported model, in another process.

        The first half of a row is computed at once, the rest token by token.
        """
        return Elsewhere("bundle", directory, numpy_only=True)

    def usage(self, directory: Path, name: str) -> str:
        lines = len((directory / PROGRAM).read_text(encoding="utf-8").splitlines())
        return (
            f"Two files, and numpy: `{PROGRAM}` ({lines} lines, to be read) and `{WEIGHTS}`.\n\n"
            f'```\npip install numpy\npython {name}/{PROGRAM} "Once upon a time" --max_tokens 100\n```\n'
        )


def make(config: Config | None = None, *, say: Callable[[str], None] = print) -> BundleExporter:
    return BundleExporter(config or Config(), say=say)


def program(
    config: gpt.Config, tokenizer: Tokenizer, words: Vocabulary, num_parameters: int
) -> str:
    """The text of run.py."""
    given = {
        **words.given,
        **choices(config),
        "num_parameters": f"{num_parameters:,}",
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "padded_vocabulary": tokenizer.vocab_size < config.vocab_size,
    }
    return compose("run", given)


def layers_apart(params: hf.Params) -> Iterator[tuple[str, np.ndarray]]:
    """Names as run.py has them, and views: `layers.3.mlp.up` of our stack.layers.mlp.up."""
    for name, x in params.items():
        inner = name.removeprefix("stack.layers.")
        if inner == name:
            yield name, x
        else:
            yield from ((f"layers.{i}.{inner}", y) for i, y in enumerate(x))


class Stored:
    """A parameter as the file has it: heads side by side, so that x @ matrix is all there is to it."""

    def __init__(self, name: str, x: np.ndarray, kind: str):
        part = name.rpartition(".")[2]
        if part in ("query", "key", "value"):  # [D, N, H]
            x = x.reshape(x.shape[0], -1)
        elif part == "out":  # [N, H, D]
            x = x.reshape(-1, x.shape[-1])
        elif part in ("query_bias", "key_bias", "value_bias"):
            x = x.reshape(-1)
        # A router decides by small differences.
        self.kind = "F32" if x.ndim < 2 or part == "router" else kind
        self.shape, self._x = x.shape, x

    def array(self) -> np.ndarray:
        return self._x.astype(DTYPES[self.kind], copy=False)


def choices(config: gpt.Config) -> dict[str, Any]:
    """What the template asks about the model."""
    kinds = config.transformer().kinds
    mixed = len(kinds) > 1
    (local_spec, local_rope), (_, rope) = kinds[0], kinds[-1]
    mlp = config.experts or config
    norm = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}[config.norm]
    rotary = config.position == "rotary"
    given = {
        name: getattr(config, name)
        for name in ("vocab_size", "max_length", "num_layers", "embed_dim", "num_heads", "num_kv_heads",
                     "head_dim", "norm_epsilon", "norm_bias", "global_every", "attention_bias",
                     "attention_out_bias", "mlp_bias", "final_soft_cap", "scale_embeddings")
    }  # fmt: skip
    given |= {
        "grouped": config.num_kv_heads != config.num_heads,
        "norm": norm,
        "layernorm": config.norm == "layernorm",
        "rmsnorm": config.norm == "rmsnorm" or config.qk_norm,
        "unit_offset": config.norm_unit_offset,
        "qk_norm_per_head": config.qk_norm and config.qk_norm_over == "head",
        "qk_norm_over_all": config.qk_norm and config.qk_norm_over == "all_heads",
        "learned": config.position == "learned",
        "rotary": rotary,
        "mixed": mixed,
        "windowed": local_spec.window is not None,
        "window": local_spec.window,
        "local_rope": mixed and local_rope != rope,
        "scale": config.attention_scale or "HEAD_DIM**-0.5",
        "soft_cap": config.attention_soft_cap,
        "view": "visible, turn" if rotary else "visible",
        "call": "*view" if mixed else "visible, turn" if rotary else "visible",
        "moe": config.experts is not None,
        "mlp": "experts" if config.experts else "mlp",
        "gated": mlp.gated,
        "head_matrix": 'params["embed"].T' if config.tie_embeddings else 'params["head"]',
    }
    for activation in ("gelu", "gelu_tanh", "silu", "relu", "relu_squared"):
        given[activation] = mlp.activation == activation
    for placement in ("pre", "post", "output", "both"):
        given[placement] = config.norm_placement == placement
    scaling = rope.scaling if rope else None
    for kind in ("llama3", "linear"):
        given[f"{kind}_scaling"] = scaling is not None and scaling.kind == kind
    if rope is not None:
        given |= {"rope_theta": rope.theta, "local_rope_theta": local_rope.theta}
    if scaling is not None:
        given |= {
            "rope_factor": scaling.factor,
            "rope_low": scaling.low_frequency_factor,
            "rope_high": scaling.high_frequency_factor,
            "rope_original_length": scaling.original_max_length,
        }
    if config.experts is not None:
        given |= {
            "experts_per_token": config.experts.experts_per_token,
            "normalize_weights": config.experts.normalize_weights,
            "shared_expert": config.experts.shared_dim is not None,
        }
    return given


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, texts: Sequence[str] = PROBES) -> None:
    program = Elsewhere("bundle_tokenizer", folder, numpy_only=True)
    answer = program.answer(texts=np.frombuffer(json.dumps(texts).encode("ascii"), np.uint8))
    for text, ids in zip(texts, json.loads(answer["ids"].tobytes()), strict=True):
        if ids != tokenizer.encode(text):
            raise RunError(
                f"the export's tokenizer makes {ids} of {text!r}, ours {tokenizer.encode(text)}"
            )
