"""Two files: model.safetensors, and run.py, which needs Python and numpy only and reads like a textbook.

run.py is composed for the model at hand (standalone/run.py is the template): one that has no experts has no
line about experts. The parameters keep our names, layers apart, each matrix as `x @ matrix` wants it.

The export is run by another process that can import nothing but the standard library and numpy:
`load_back` gives its logits, half of them from its cache, and its tokenizer is compared with ours.
"""

import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import vocabulary
from llm_jax.models import gpt
from llm_jax.sharding.rules import path_name
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


@dataclasses.dataclass(frozen=True)
class Config:
    """dtype: of matrices in the file; run.py computes in float32 whatever it is."""

    name: str = "bundle"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class BundleExporter:
    """An Exporter of decoders for Python with numpy."""

    def __init__(self, config: Config, *, say: Callable[[str], None] = print):
        self.config, self._say = config, say

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
        directory = Path(directory).resolve()
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{directory} is there and not empty: choose another folder")
        if config.model.name != "gpt":
            raise ConfigError(
                f"format bundle has no model {config.model.name!r}; choices: gpt (all decoders), or "
                "--format hf for every model"
            )
        check_vocabulary(config, tokenizer.vocab_size)
        words = vocabulary(tokenizer)
        tensors = parameters(model, self.config.dtype)
        count = sum(math.prod(x.shape) for x in tensors.values())
        given = {**words.given, **choices(config.model), "num_parameters": f"{count:,}"}
        given |= {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        given["padded_vocabulary"] = tokenizer.vocab_size < config.model.vocab_size
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        try:
            temporary.mkdir(parents=True)
            (temporary / PROGRAM).write_text(compose("run", given), encoding="utf-8")
            save_file(tensors | words.tensors, temporary / WEIGHTS, metadata={"format": "np"})
            _check_tokenizer(temporary, tokenizer)
            os.replace(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return directory

    def load_back(self, directory: Path) -> Callable[[np.ndarray], np.ndarray]:
        """The exported model, in another process: tokens [B, T] int32 to logits [B, T, V] float32.

        The first half of a row is computed at once, the rest token by token.
        """

        def logits(tokens: np.ndarray) -> np.ndarray:
            file = io.BytesIO()
            np.save(file, np.asarray(tokens, np.int32))
            return np.load(io.BytesIO(_run(Path(directory), _LOGITS, file.getvalue())))

        return logits


def make(config: Config | None = None, *, say: Callable[[str], None] = print) -> BundleExporter:
    return BundleExporter(config or Config(), say=say)


def parameters(model: Model, dtype: str) -> dict[str, np.ndarray]:
    """By names as run.py has them: heads side by side in matrices, `layers.3.mlp.up` for our stack.layers.mlp.up [3]."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    result: dict[str, np.ndarray] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        name = path_name(path)
        if not name.startswith("stack.layers."):
            result[name] = _stored(name, x, dtype)
            continue
        name = name.removeprefix("stack.layers.")
        result |= {f"layers.{i}.{name}": _stored(name, y, dtype) for i, y in enumerate(x)}
    return result


def _stored(name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    part = name.rpartition(".")[2]
    if part in ("query", "key", "value"):  # [D, N, H]
        x = x.reshape(x.shape[0], -1)
    elif part == "out":  # [N, H, D]
        x = x.reshape(-1, x.shape[-1])
    elif part in ("query_bias", "key_bias", "value_bias"):
        x = x.reshape(-1)
    exact = x.ndim < 2 or part == "router"  # a router decides by small differences
    return np.ascontiguousarray(x, np.float32 if exact else np.dtype(dtype))


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
        "scale": config.attention_scale or config.head_dim**-0.5,
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


def _check_tokenizer(directory: Path, tokenizer: Tokenizer, texts: Sequence[str] = PROBES) -> None:
    found = json.loads(_run(directory, _ENCODE, json.dumps(texts).encode("ascii")))
    for text, ids in zip(texts, found, strict=True):
        if ids != tokenizer.encode(text):
            raise RunError(
                f"the export's tokenizer makes {ids} of {text!r}, ours {tokenizer.encode(text)}"
            )


_PRELUDE = """
import sys

sys.path.append(sys.argv[1])


class OnlyNumpy:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy"}:
            raise ImportError(f"{name} is neither numpy nor of the standard library")


sys.meta_path.insert(0, OnlyNumpy)
import io
import json
import pathlib
import runpy
import numpy as np

run = runpy.run_path(sys.argv[2] + "/run.py")
params = run["load"](pathlib.Path(sys.argv[2], "model.safetensors"))
"""
_LOGITS = """
rows = []
for row in np.load(io.BytesIO(sys.stdin.buffer.read())).tolist():
    cache, half = run["empty_cache"](len(row)), (len(row) + 1) // 2
    parts = [run["forward"](params, row[:half], 0, cache)]
    parts += [run["forward"](params, [row[i]], i, cache) for i in range(half, len(row))]
    rows.append(run["logits"](params, np.concatenate(parts)))
file = io.BytesIO()
np.save(file, np.stack(rows))
sys.stdout.buffer.write(file.getvalue())
"""
_ENCODE = """
tokenizer = run["Tokenizer"](params)
texts = json.loads(sys.stdin.buffer.read())
print(json.dumps([tokenizer.encode(text) for text in texts]))
"""


def _run(directory: Path, code: str, given: bytes) -> bytes:
    """What a process writes that knows run.py as `run`, and no package but numpy."""
    packages = str(Path(np.__file__).parents[1])
    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PRELUDE + code, packages, str(directory)],
        input=given,
        capture_output=True,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RunError(
            f"the export's {PROGRAM} fails: {lines[-1] if lines else process.returncode}"
        )
    return process.stdout
