"""config.json of Hugging Face against our Config: keys, values, and what is refused.

Every key must be one of a field or group of the architecture's table, one with a single value that we
can compute, or one that changes nothing we compute; any other is an error that names it. Read are files
of transformers 4.x, as on the hub, and of 5.x; what is written suits both.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax.core.config import ConfigError, parse
from llm_jax.nn.rope import RopeScaling

# transformers has several names for one function; the first is the one that is written.
ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
    "relu_squared": ("relu2",),
}

# Of a file, of generation, of how a model is run, of a task: nothing that our models compute by.
_IGNORED = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype",
    "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation",
    "_attn_implementation_autoset", "attn_implementation", "torchscript", "use_bfloat16",
    "gradient_checkpointing", "chunk_size_feed_forward", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_past", "tokenizer_class",
    "task_specific_params", "prefix", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "mask_token_id", "unk_token_id", "cls_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty",
    "cache_implementation",
}  # fmt: skip
# What transformers computes otherwise than we do, whatever the architecture.
_ONLY = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of ours that is one key of config.json.

    default: what it means when config.json leaves the key out; tells the type, unless it is None.
    also: other names of the key, read and not written.
    names: our choices, each with what transformers calls it.
    """

    ours: str
    key: str
    default: Any
    also: tuple[str, ...] = ()
    names: Mapping[str, Sequence[str]] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *self.also)

    def read(self, content: Mapping[str, Any]) -> Any:
        found = {key: content[key] for key in self.keys if key in content}
        key, value = next(iter(found.items()), (self.key, self.default))
        if any(other != value for other in found.values()):
            raise ConfigError(f"config.json contradicts itself: {_pairs(found)}")
        check_type(key, value, self.default)
        return value if self.names is None else self._our_name(key, value)

    def write(self, value: Any) -> Any:
        return value if self.names is None else self.names[value][0]

    def _our_name(self, key: str, value: str) -> str:
        for ours, theirs in self.names.items():
            if value in theirs:
                return ours
        known = ", ".join(name for names in self.names.values() for name in names)
        raise ConfigError(f"config.json: {key} = {value!r} cannot be computed; choices: {known}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Several keys of config.json that make several fields of ours.

    read: (content, values of the Fields) to values of ours; write: all values of ours to keys.
    """

    keys: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]


def check_keys(
    content: Mapping[str, Any], class_name: str, *, understood: set[str], only: Mapping[str, Any]
) -> None:
    """Raises ConfigError for keys that are not understood and values that we cannot compute."""
    only = {**{k: v for k, v in _ONLY.items() if k not in understood}, **only}
    unknown = {k: v for k, v in content.items() if k not in understood | only.keys() | _IGNORED}
    if unknown:
        raise ConfigError(
            f"config.json: not understood for {class_name}: {_pairs(unknown)}; whoever knows that "
            "it changes nothing can take it out"
        )
    for key, value in only.items():
        if content.get(key, value) not in (value, None):
            raise ConfigError(
                f"config.json: {key} = {content[key]!r} cannot be computed, only {value!r}"
            )


def _pairs(values: Mapping[str, Any]) -> str:
    shorten = lambda text: text if len(text) <= 60 else text[:57] + "..."  # noqa: E731
    return ", ".join(f"{key} = {shorten(repr(value))}" for key, value in values.items())


def value_of(content: Mapping[str, Any], key: str, default: Any, *, least: int = 1) -> Any:
    """The value of a key; ConfigError where it is neither null nor of the default's type.

    Args:
      least: of a whole number.
    """
    value = content.get(key, default)
    check_type(key, value, default, least)
    return value


def check_type(key: str, value: Any, default: Any, least: int = 1) -> None:
    """Raises ConfigError where a value is neither null nor of the default's type."""
    kinds = {bool: (bool, "true or false"), int: (int, f"a whole number from {least} on"),
             float: ((int, float), "a number"), str: (str, "a name")}  # fmt: skip
    if value is None or type(default) not in kinds:
        return
    kind, wanted = kinds[type(default)]
    wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    if wrong or (kind is int and value < least):
        raise ConfigError(f"config.json: {key} = {value!r}: expected {wanted}")


_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


def rope(theta: float = 10_000.0) -> Group:
    """Rotary positions: our rope_theta and rope_scaling.

    Under the keys of transformers 5 (rope_parameters) and of 4 (rope_theta, rope_scaling).
    """

    def read(content, values):
        found = _section(content, "rope_scaling") or _section(content, "rope_parameters")
        return _read_rope(content, found, value_of(content, "rope_theta", theta))

    def write(values):
        return {
            "rope_parameters": _write_rope(values["rope_theta"], values["rope_scaling"]),
            "rope_theta": values["rope_theta"],
            "rope_scaling": _write_scaling(values["rope_scaling"]),
        }

    return Group(_ROPE_KEYS, ("rope_theta", "rope_scaling"), read, write)


def local_rope(theta: float, local_theta: float) -> Group:
    """As `rope`, with a theta of its own in the windowed layers (Gemma 3): our local_rope_theta."""

    def read(content, values):
        both = _section(content, "rope_parameters")
        whole = {**_section(both, "full_attention"), **_section(content, "rope_scaling")}
        ours = _read_rope(content, whole, value_of(content, "rope_theta", theta))
        local = value_of(content, "rope_local_base_freq", local_theta)
        local = _read_rope(content, _section(both, "sliding_attention"), local)
        extra = both.keys() - {"full_attention", "sliding_attention"}
        if extra or local["rope_scaling"] is not None:
            raise ConfigError(f"config.json: rotary positions {both!r} cannot be computed")
        return {**ours, "local_rope_theta": local["rope_theta"]}

    def write(values):
        scaling = values["rope_scaling"]
        return {
            "rope_parameters": {
                "full_attention": _write_rope(values["rope_theta"], scaling),
                "sliding_attention": _write_rope(values["local_rope_theta"], None),
            },
            "rope_theta": values["rope_theta"],
            "rope_local_base_freq": values["local_rope_theta"],
            "rope_scaling": _write_scaling(scaling),
        }

    fields = ("rope_theta", "rope_scaling", "local_rope_theta")
    return Group((*_ROPE_KEYS, "rope_local_base_freq"), fields, read, write)


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = content.get(key) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} = {section!r}: expected keys and values")
    return section


# The keys of transformers, and our fields.
_SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_max_length",
    },
}


def _read_rope(
    content: Mapping[str, Any], found: Mapping[str, Any], theta: float
) -> dict[str, Any]:
    """rope_theta and rope_scaling of ours, from one dictionary of rope parameters."""
    kind = found.get("rope_type", found.get("type", "default"))
    keys = _SCALINGS.get(kind, {})
    others = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    part = found.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    if kind not in _SCALINGS or found.keys() - keys - others or part not in (None, 1):
        wrong = dict(found) if part in (None, 1) else {"partial_rotary_factor": part}
        raise ConfigError(
            f"config.json: rotary positions {wrong!r} cannot be computed; choices of rope_type: "
            f"{', '.join(_SCALINGS)}, the same for all layers and the whole head"
        )
    if kind == "llama3":
        length = value_of(content, "max_position_embeddings", 2048)
        found = {"original_max_position_embeddings": length, **found}
    if keys.keys() - found.keys():
        missing = ", ".join(sorted(keys.keys() - found.keys()))
        raise ConfigError(f"config.json: {kind} rope lacks {missing}")
    scaling = None
    if keys:
        values = {ours: found[key] for key, ours in keys.items()}
        scaling = parse(RopeScaling, {"kind": kind, **values}, "config.json.rope_scaling")
    return {"rope_theta": found.get("rope_theta", theta), "rope_scaling": scaling}


def _write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    return {"rope_theta": theta, **(_write_scaling(scaling) or {"rope_type": "default"})}


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {key: getattr(scaling, ours) for key, ours in _SCALINGS[scaling.kind].items()}
    return {"rope_type": scaling.kind, **values}
