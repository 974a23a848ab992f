"""GPT-2, Llama, Qwen2 and Qwen3 of Hugging Face: names, layouts and configs, for both directions.

One table per architecture. A row of `tensors` reads

    our path | its dimensions | Hugging Face's name, `{}` the layer | its dimensions

in letters: D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, T positions. `(N H)` is
one dimension made of two. Our blocks are stacked along a first axis that the rows leave out. GPT-2
keeps query, key and value side by side in one tensor: there three of our paths make one, along "3".
A row counts where our model has its paths, so biases and heads come and go with the config.

Source: transformers 5.23, models/{gpt2,llama,qwen2,qwen3}; config.json is also read by 4.x.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, parse
from llm_jax.models.gpt.config import Config
from llm_jax.nn.rope import RopeScaling

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Row:
    """paths, dims: ours; several paths, with one space between, lie along the first of the dims."""

    paths: str
    dims: str
    name: str
    hf_dims: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the Hugging Face tensor."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self._groups())

    def to_hf(self, parts: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        """One layer's arrays of `paths` as the Hugging Face tensor, contiguous."""
        x = np.stack(parts) if len(parts) > 1 else parts[0]
        order = [self.dims.split().index(letter) for letter in self._letters()]
        return np.ascontiguousarray(x.transpose(order).reshape(self.shape(sizes)))

    def from_hf(self, tensor: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
        """The inverse of `to_hf`; views of `tensor` where it can be."""
        letters = self._letters()
        x = tensor.reshape([sizes[letter] for letter in letters])
        x = x.transpose([letters.index(letter) for letter in self.dims.split()])
        return list(x) if len(self.paths.split()) > 1 else [x]

    def _groups(self) -> list[list[str]]:
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", self.hf_dims)]

    def _letters(self) -> list[str]:
        return [letter for group in self._groups() for letter in group]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What one class of transformers computes, in terms of our Config.

    fields: (ours, Hugging Face's key, what it means when config.json leaves it out).
    fixed: values of our other fields, which may depend on those of `fields`.
    only: keys that we can serve with this value alone, which is also transformers' default.
    written: keys that are written and not read.
    prefix: what checkpoints of the headless class leave out of the names.
    buffers: names in old checkpoints that are no parameters.
    """

    model_type: str
    class_name: str
    prefix: str
    fields: tuple[tuple[str, str, Any], ...]
    fixed: Callable[[Mapping[str, Any]], dict[str, Any]]
    only: Mapping[str, Any]
    written: Mapping[str, Any]
    buffers: re.Pattern
    tensors: tuple[Row, ...]

    def obstacles(self, config: Config) -> dict[str, Any]:
        """Our fields that it has no place for, with the value it would take."""
        values = vars(config)
        fixed = {**_NOWHERE, **self.fixed(values)}
        return {k: v for k, v in fixed.items() if values[k] != v}


# What none of the architectures below has.
_NOWHERE = {"experts": None, "attention_window": None, "attention_soft_cap": None}


def _in_blocks(prefix: str, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of one block, with the paths and names they have in the whole model."""
    return tuple(
        Row(
            " ".join(f"stack.layers.{path}" for path in row.paths.split()),
            row.dims,
            prefix + row.name,
            row.hf_dims,
        )
        for row in rows
    )


_GPT2_BLOCK = (
    Row("attention_norm.scale", "D", "ln_1.weight", "D"),
    Row("attention_norm.bias", "D", "ln_1.bias", "D"),
    Row("attention.query attention.key attention.value", "3 D N H",
        "attn.c_attn.weight", "D (3 N H)"),
    Row("attention.query_bias attention.key_bias attention.value_bias", "3 N H",
        "attn.c_attn.bias", "(3 N H)"),
    Row("attention.out", "N H D", "attn.c_proj.weight", "(N H) D"),
    Row("attention.out_bias", "D", "attn.c_proj.bias", "D"),
    Row("mlp_norm.scale", "D", "ln_2.weight", "D"),
    Row("mlp_norm.bias", "D", "ln_2.bias", "D"),
    Row("mlp.up", "D F", "mlp.c_fc.weight", "D F"),
    Row("mlp.up_bias", "F", "mlp.c_fc.bias", "F"),
    Row("mlp.down", "F D", "mlp.c_proj.weight", "F D"),
    Row("mlp.down_bias", "D", "mlp.c_proj.bias", "D"),
)  # fmt: skip

_LLAMA_BLOCK = (
    Row("attention_norm.scale", "D", "input_layernorm.weight", "D"),
    Row("attention.query", "D N H", "self_attn.q_proj.weight", "(N H) D"),
    Row("attention.key", "D K H", "self_attn.k_proj.weight", "(K H) D"),
    Row("attention.value", "D K H", "self_attn.v_proj.weight", "(K H) D"),
    Row("attention.query_bias", "N H", "self_attn.q_proj.bias", "(N H)"),
    Row("attention.key_bias", "K H", "self_attn.k_proj.bias", "(K H)"),
    Row("attention.value_bias", "K H", "self_attn.v_proj.bias", "(K H)"),
    Row("attention.query_norm.scale", "H", "self_attn.q_norm.weight", "H"),
    Row("attention.key_norm.scale", "H", "self_attn.k_norm.weight", "H"),
    Row("attention.out", "N H D", "self_attn.o_proj.weight", "D (N H)"),
    Row("attention.out_bias", "D", "self_attn.o_proj.bias", "D"),
    Row("mlp_norm.scale", "D", "post_attention_layernorm.weight", "D"),
    Row("mlp.gate", "D F", "mlp.gate_proj.weight", "F D"),
    Row("mlp.gate_bias", "F", "mlp.gate_proj.bias", "F"),
    Row("mlp.up", "D F", "mlp.up_proj.weight", "F D"),
    Row("mlp.up_bias", "F", "mlp.up_proj.bias", "F"),
    Row("mlp.down", "F D", "mlp.down_proj.weight", "D F"),
    Row("mlp.down_bias", "D", "mlp.down_proj.bias", "D"),
)

GPT2 = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    fields=(
        ("vocab_size", "vocab_size", 50257),
        ("embed_dim", "n_embd", 768),
        ("num_layers", "n_layer", 12),
        ("num_heads", "n_head", 12),
        ("mlp_dim", "n_inner", None),
        ("max_length", "n_positions", 1024),
        ("activation", "activation_function", "gelu_new"),
        ("norm_epsilon", "layer_norm_epsilon", 1e-5),
        ("tie_embeddings", "tie_word_embeddings", True),
        ("dropout", "resid_pdrop", 0.1),
        ("init_stddev", "initializer_range", 0.02),
    ),
    fixed=lambda values: {
        "norm": "layernorm",
        "norm_bias": True,
        "position": "learned",
        "gated": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "num_kv_heads": values["num_heads"],
        "head_dim": values["embed_dim"] / values["num_heads"],
    },
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    written={"attn_pdrop": 0.0},
    buffers=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    tensors=(
        Row("embed", "V D", "transformer.wte.weight", "V D"),
        Row("position_embed", "T D", "transformer.wpe.weight", "T D"),
        *_in_blocks("transformer.h.{}.", _GPT2_BLOCK),
        Row("final_norm.scale", "D", "transformer.ln_f.weight", "D"),
        Row("final_norm.bias", "D", "transformer.ln_f.bias", "D"),
        Row("head", "D V", "lm_head.weight", "V D"),
    ),
)

_LLAMA_FIXED = {
    "norm": "rmsnorm",
    "norm_bias": False,
    "position": "rotary",
    "gated": True,
    "qk_norm": False,
}
_LLAMA_FIELDS = (
    ("vocab_size", "vocab_size", 32000),
    ("embed_dim", "hidden_size", 4096),
    ("num_layers", "num_hidden_layers", 32),
    ("num_heads", "num_attention_heads", 32),
    ("num_kv_heads", "num_key_value_heads", None),
    ("head_dim", "head_dim", None),
    ("mlp_dim", "intermediate_size", 11008),
    ("max_length", "max_position_embeddings", 2048),
    ("activation", "hidden_act", "silu"),
    ("norm_epsilon", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("attention_bias", "attention_bias", False),
    ("mlp_bias", "mlp_bias", False),
    ("init_stddev", "initializer_range", 0.02),
)

LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    prefix="model.",
    fields=_LLAMA_FIELDS,
    fixed=lambda values: {
        **_LLAMA_FIXED,
        "attention_out_bias": values["attention_bias"],
        # LlamaConfig refuses another size, even where head_dim makes it harmless.
        "embed_dim": values["embed_dim"] // values["num_heads"] * values["num_heads"],
    },
    only={},
    written={"attention_dropout": 0.0},
    buffers=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    tensors=(
        Row("embed", "V D", "model.embed_tokens.weight", "V D"),
        *_in_blocks("model.layers.{}.", _LLAMA_BLOCK),
        Row("final_norm.scale", "D", "model.norm.weight", "D"),
        Row("head", "D V", "lm_head.weight", "V D"),
    ),
)

_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
_QWEN_FIELDS = tuple(
    (ours, key, _QWEN_DEFAULTS.get(key, default))
    for ours, key, default in _LLAMA_FIELDS
    if key != "mlp_bias"
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    fields=tuple(field for field in _QWEN_FIELDS if field[0] != "attention_bias"),
    fixed=lambda values: {
        **_LLAMA_FIXED,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    only={"use_sliding_window": False},
)

QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    fields=tuple(
        (ours, key, 128 if key == "head_dim" else default) for ours, key, default in _QWEN_FIELDS
    ),
    fixed=lambda values: {
        **_LLAMA_FIXED,
        "attention_out_bias": values["attention_bias"],
        "mlp_bias": False,
        "qk_norm": True,
    },
    only={"use_sliding_window": False},
)

ARCHITECTURES = {a.model_type: a for a in (GPT2, LLAMA, QWEN2, QWEN3)}

# transformers has several names for one function; the first is the one that is written.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
    "relu_squared": ("relu2",),
}


def architecture_for(config: Config) -> Architecture:
    """The architecture that computes what this config does.

    Raises:
      ConfigError: there is none; names what stands between the config and the nearest.
    """
    obstacles = {name: a.obstacles(config) for name, a in ARCHITECTURES.items()}
    name = min(obstacles, key=lambda name: len(obstacles[name]))
    if obstacles[name]:
        wrong = " and ".join(
            f"model.{field}"
            + ("" if field == "experts" else f" = {getattr(config, field)!r}")
            + f" (it takes {value!r})"
            for field, value in obstacles[name].items()
        )
        raise ConfigError(
            f"no Hugging Face architecture computes this model; the nearest, "
            f"{ARCHITECTURES[name].class_name}, has no place for {wrong}"
        )
    return ARCHITECTURES[name]


def sizes(config: Config) -> dict[str, int]:
    """What the letters of the tables stand for."""
    return {
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_dim,
        "V": config.vocab_size,
        "T": config.max_length,
        "3": 3,
    }


def hf_config(
    config: Config,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      ConfigError: no architecture of Hugging Face computes this model.
    """
    architecture = architecture_for(config)
    out: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
    }
    out |= {key: getattr(config, ours) for ours, key, _ in architecture.fields}
    activation = _activation_key(architecture)
    out[activation] = _ACTIVATIONS[out[activation]][0]
    out |= {**architecture.only, **architecture.written}
    if config.position == "rotary":
        out |= _rope_to_hf(config)
    # The embedding's row of pad_token_id gets no gradient in transformers: never a token in use.
    pad_id = None if pad_id in (bos_id, eos_id) else pad_id
    out |= {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    return out | {"dtype": "float32", "torch_dtype": "float32"}  # the key of 5.x, of 4.x


def config_from_hf(content: Mapping[str, Any]) -> Config:
    """The Config of a config.json.

    Raises:
      ConfigError: another architecture, or an option that our model cannot compute.
    """
    architecture = ARCHITECTURES.get(content.get("model_type"))
    if architecture is None:
        raise ConfigError(
            f"model_type = {content.get('model_type')!r} cannot be read; "
            f"choices: {', '.join(ARCHITECTURES)}"
        )
    _check_options(architecture, content)
    values = {ours: content.get(key, default) for ours, key, default in architecture.fields}
    for field in ("embed_dim", "num_heads"):
        if not isinstance(values[field], int) or values[field] < 1:
            raise ConfigError(f"config.json: {field} = {values[field]!r}: expected a positive int")
    if values["mlp_dim"] is None:
        values["mlp_dim"] = 4 * values["embed_dim"]
    values["activation"] = _our_activation(values["activation"])
    values = {**architecture.fixed(values), **values}
    if values["position"] == "rotary":
        values |= _rope_from_hf(content)
    return parse(Config, values, "config.json")


def _activation_key(architecture: Architecture) -> str:
    return next(key for ours, key, _ in architecture.fields if ours == "activation")


def _our_activation(name: str) -> str:
    for ours, theirs in _ACTIVATIONS.items():
        if name in theirs:
            return ours
    known = ", ".join(name for names in _ACTIVATIONS.values() for name in names)
    raise ConfigError(f"config.json: activation {name!r} cannot be computed; choices: {known}")


def _check_options(architecture: Architecture, content: Mapping[str, Any]) -> None:
    only = {**architecture.only, "partial_rotary_factor": 1.0, "quantization_config": None}
    for key, value in only.items():
        if content.get(key, value) not in (value, None):
            raise ConfigError(
                f"config.json: {key} = {content[key]!r} cannot be computed, only {value!r}"
            )
    others = set(content.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ConfigError(
            f"config.json: layer_types has {', '.join(sorted(others))}; only full_attention can be "
            "computed"
        )


def _rope_to_hf(config: Config) -> dict[str, Any]:
    """Under the keys of transformers 5 (rope_parameters) and of 4 (rope_theta, rope_scaling)."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency_factor,
            "high_freq_factor": config.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_length,
        }
    return {
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def _rope_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    per_layer = any(isinstance(value, Mapping) for value in rope.values())
    if kind not in ("default", "llama3") or per_layer or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"config.json: rotary positions {dict(rope)!r} cannot be computed; "
            "choices of rope_type: default, llama3, the same for all layers and the whole head"
        )
    scaling = None
    if kind == "llama3":
        missing = {"factor", "low_freq_factor", "high_freq_factor"} - rope.keys()
        if missing:
            raise ConfigError(f"config.json: llama3 rope lacks {', '.join(sorted(missing))}")
        length = content.get("max_position_embeddings", 2048)
        scaling = RopeScaling(
            factor=float(rope["factor"]),
            low_frequency_factor=float(rope["low_freq_factor"]),
            high_frequency_factor=float(rope["high_freq_factor"]),
            original_max_length=int(rope.get("original_max_position_embeddings", length)),
        )
    theta = rope.get("rope_theta", content.get("rope_theta", 10_000.0))
    return {"rope_theta": theta, "rope_scaling": scaling}
