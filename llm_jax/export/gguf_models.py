"""Decoders as llama.cpp has them: names and layouts of tensors, and the metadata it computes by.

Everything starts from the tables of models/gpt/hf.py: a tensor of GGUF is one of Hugging Face's, or the experts of
a layer stacked, under the name of gguf's own maps. What differs: `llama` has the two members of a rotated pair
side by side, Gemma's norms have their 1 added, GPT-2's matrices are [out, in] as all others are, and where a
scale of the scores is fixed, the model's own goes into the queries.

llama.cpp knows no windows in most architectures. A model with one computes the same as long as its context is
not longer, so that is the context length that the file tells.

Source: src/models/*.cpp and conversion/*.py of llama.cpp, as llama-cpp-python 0.3.36 brings them.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, parse, to_dict
from llm_jax.models.gpt import Config
from llm_jax.models.gpt import hf as gpt_hf
from llm_jax.models.hf_table import Architecture, Entry, Plan, flat, nested
from llm_jax.nn.rope import RopeConfig, RopeScaling, rope_frequencies

ROPE_FACTORS = (
    "rope_freqs.weight"  # what llama.cpp divides rotary frequencies by: a scaling as of Llama 3
)
_SCALING_KEY = "llm_jax.rope_scaling"
_LEAST_CONTEXT = 128


@dataclasses.dataclass(frozen=True)
class Convention:
    """How llama.cpp has one class of transformers.

    name: of its architecture. only: values of our config, by dotted path, that it computes with alone.
    needed: fields that may not be None. rotated_pairs, norm_offset, windows: see the module.
    whole_heads: num_heads times head_dim must be embed_dim. own_head: there is no tied one, a copy is
    written. scaling: kinds of rope scaling.
    odd_scale: the scores' scale is that of head_dim, at this number of layers of embed_dim / num_heads.
    """

    name: str
    only: Mapping[str, Any]
    needed: tuple[str, ...] = ()
    rotated_pairs: bool = False
    norm_offset: bool = False
    windows: bool = False
    whole_heads: bool = False
    own_head: bool = False
    scaling: tuple[str, ...] = ("linear",)
    odd_scale: int | None = None


_SILU = {"activation": "silu"}
_EXPERT_SILU = {"experts.activation": "silu"}
_NO_BIAS = {"attention_bias": False}
_LLAMA = Convention("llama", _SILU, rotated_pairs=True, scaling=("linear", "llama3"))
_GEMMA2 = Convention(
    "gemma2",
    {"activation": "gelu_tanh", "tie_embeddings": True, **_NO_BIAS},
    needed=("attention_soft_cap", "final_soft_cap"),
    norm_offset=True,
    windows=True,
    odd_scale=46,
)
CONVENTIONS = {
    "GPT2LMHeadModel": Convention("gpt2", {"activation": "gelu_tanh"}, scaling=()),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": dataclasses.replace(_LLAMA, only=_EXPERT_SILU),
    "Qwen2ForCausalLM": Convention("qwen2", _SILU, whole_heads=True),
    "Qwen3ForCausalLM": Convention("qwen3", _SILU | _NO_BIAS),
    "Qwen3MoeForCausalLM": Convention(
        "qwen3moe", _EXPERT_SILU | _NO_BIAS | {"experts.normalize_weights": True}
    ),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": dataclasses.replace(
        _GEMMA2,
        name="gemma3",
        only={"activation": "gelu_tanh", **_NO_BIAS},
        needed=(),
        odd_scale=62,
    ),
    "Olmo2ForCausalLM": Convention("olmo2", _SILU | _NO_BIAS, whole_heads=True, own_head=True),
}


def convention_for(architecture: Architecture, config: Config) -> Convention:
    """Raises ConfigError for a model that llama.cpp does not compute; says why, and the choices."""
    convention = CONVENTIONS.get(architecture.class_name)
    if convention is None:
        raise ConfigError(
            f"llama.cpp has no {architecture.class_name}; choices: {', '.join(CONVENTIONS)}"
        )
    values = flat(config)
    wrong = {k: v for k, v in convention.only.items() if values.get(k) != v}
    for field in convention.needed:
        if values[field] is None:
            wrong[field] = "a number"
    kind = None if config.rope_scaling is None else config.rope_scaling.kind
    if kind is not None and kind not in convention.scaling:
        wrong["rope_scaling.kind"] = " or ".join(map(repr, (*convention.scaling, None)))
        values["rope_scaling.kind"] = kind
    if convention.whole_heads and config.num_heads * config.head_dim != config.embed_dim:
        wrong["head_dim"] = config.embed_dim // config.num_heads
    if not convention.windows and context_length(convention, config) < min(
        _LEAST_CONTEXT, config.max_length
    ):
        wrong["attention_window"] = f"{_LEAST_CONTEXT} and more, or none"
    if wrong:
        found = " and ".join(f"model.{k} = {values[k]!r} (it takes {v})" for k, v in wrong.items())
        raise ConfigError(
            f"llama.cpp computes {architecture.class_name} otherwise: no place for {found}"
        )
    return convention


def context_length(convention: Convention, config: Config) -> int:
    window = config.attention_window
    return (
        config.max_length
        if convention.windows or window is None
        else min(window, config.max_length)
    )


def metadata(convention: Convention, config: Config) -> dict[str, Any]:
    """Keys and values of the file; a float is a float32 there, an int a uint32."""
    name, experts = convention.name, config.experts
    out: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": context_length(convention, config),
        "embedding_length": config.embed_dim,
        "block_count": config.num_layers,
        "feed_forward_length": experts.mlp_dim if experts else config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        _epsilon_key(config.norm): float(config.norm_epsilon),
    }
    if config.position == "rotary":
        out["rope.dimension_count"] = config.head_dim
        out["rope.freq_base"] = float(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if experts:
        out |= {
            "expert_count": experts.num_experts,
            "expert_used_count": experts.experts_per_token,
            "expert_feed_forward_length": experts.mlp_dim,
        }
    if convention.windows and config.attention_window is not None:
        every = config.global_every
        layers = range(1, config.num_layers + 1)
        out["attention.sliding_window"] = config.attention_window
        out["attention.sliding_window_pattern"] = [every is None or n % every != 0 for n in layers]
        out["rope.freq_base_swa"] = float(config.local_rope_theta or config.rope_theta)
    if config.attention_soft_cap is not None:
        out["attn_logit_softcapping"] = float(config.attention_soft_cap)
    if config.final_soft_cap is not None:
        out["final_logit_softcapping"] = float(config.final_soft_cap)
    out = {f"{name}.{key}": value for key, value in out.items()}
    if scaling is not None and scaling.kind == "llama3":
        out[_SCALING_KEY] = json.dumps(to_dict(scaling))
    return out


def _epsilon_key(norm: str) -> str:
    kind = "layer_norm" if norm == "layernorm" else "layer_norm_rms"
    return f"attention.{kind}_epsilon"


def read_config(found: Mapping[str, Any], names: set[str]) -> tuple[Architecture, Config]:
    """Of a file's metadata and the names of its tensors."""
    name = found["general.architecture"]
    get = lambda key: found.get(f"{name}.{key}")  # noqa: E731
    classes = [c for c, convention in CONVENTIONS.items() if convention.name == name]
    if not classes:
        known = ", ".join(sorted({convention.name for convention in CONVENTIONS.values()}))
        raise ConfigError(f"general.architecture = {name!r} cannot be read; choices: {known}")
    class_name = "MixtralForCausalLM" if name == "llama" and get("expert_count") else classes[0]
    (architecture,) = (a for a in gpt_hf.FAMILY.architectures if a.class_name == class_name)
    convention = CONVENTIONS[class_name]
    norm = architecture.fixed["norm"]
    values: dict[str, Any] = {
        "vocab_size": len(found["tokenizer.ggml.tokens"]),
        "embed_dim": get("embedding_length"),
        "num_layers": get("block_count"),
        "num_heads": get("attention.head_count"),
        "num_kv_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "max_length": get("context_length"),
        "norm_epsilon": get(_epsilon_key(norm)),
        "tie_embeddings": "output.weight" not in names,
        "attention_soft_cap": get("attn_logit_softcapping"),
        "final_soft_cap": get("final_logit_softcapping"),
    }
    if name != "gpt2":
        values["attention_bias"] = "blk.0.attn_q.bias" in names
        values["attention_out_bias"] = "blk.0.attn_output.bias" in names
        values["mlp_bias"] = "blk.0.ffn_up.bias" in names
        values |= _rope_values(found, get)
    if convention.windows:
        values |= _window_values(get)
    if convention.odd_scale is not None:
        values["attention_scale"] = _own_scale(convention, values)
    if get("expert_count"):
        values |= {
            "experts.num_experts": get("expert_count"),
            "experts.experts_per_token": get("expert_used_count"),
            "experts.mlp_dim": get("expert_feed_forward_length"),
        }
    else:
        values["mlp_dim"] = get("feed_forward_length")
    values = {**architecture.fixed_values(values), **convention.only, **values}
    return architecture, parse(Config, nested(values), "the GGUF file")


def _rope_values(found: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    scaling = None
    if get("rope.scaling.type") == "linear":
        scaling = RopeScaling("linear", get("rope.scaling.factor"))
    elif _SCALING_KEY in found:
        scaling = parse(RopeScaling, json.loads(found[_SCALING_KEY]), _SCALING_KEY)
    return {"rope_theta": get("rope.freq_base"), "rope_scaling": scaling}


def _window_values(get: Callable[[str], Any]) -> dict[str, Any]:
    window, pattern = get("attention.sliding_window"), get("attention.sliding_window_pattern")
    if window is None:
        return {}
    whole = [number for number, local in enumerate(pattern, start=1) if not local]
    return {
        "attention_window": window,
        # Where no layer is whole, one longer than the model is as good as none.
        "global_every": whole[0] if whole else len(pattern) + 1,
        "local_rope_theta": get("rope.freq_base_swa"),
    }


def _own_scale(convention: Convention, values: Mapping[str, Any]) -> float:
    """Of the scores, as llama.cpp has it for Gemma."""
    odd = values["num_layers"] == convention.odd_scale
    return (values["embed_dim"] // values["num_heads"] if odd else values["head_dim"]) ** -0.5


def rope_factors(config: Config) -> np.ndarray | None:
    """[H / 2] float32 for ROPE_FACTORS, where there is such a scaling."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain = rope_frequencies(RopeConfig(config.rope_theta), config.head_dim)
    return plain / rope_frequencies(
        RopeConfig(config.rope_theta, config.rope_scaling), config.head_dim
    )


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of GGUF; entries: those of Hugging Face that it is made of, experts in their order."""

    name: str
    shape: tuple[int, ...]
    entries: tuple[Entry, ...]
    turned: bool = False
    heads: int | None = None  # whose pairs are put side by side
    offset: float = 0.0
    factor: float = 1.0

    def of(self, plan: Plan, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of our parameters: float32, in any order of axes."""
        if self.entries[0].row.depth == 2:
            out = np.empty(self.shape, np.float32)
            for place, entry in enumerate(self.entries):
                out[place] = plan.to_hf(entry, params)
            return out
        x = plan.to_hf(self.entries[0], params)
        x = x.T if self.turned else x
        if self.heads is not None:  # [N 2 H/2 ...] to [N H/2 2 ...]
            x = x.reshape(self.heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if self.offset or self.factor != 1:
            x = (x + np.float32(self.offset)) * np.float32(self.factor)
        return x

    def back(self, x: np.ndarray) -> list[np.ndarray]:
        """Hugging Face's tensors, one for each entry; the factor stays, as llama.cpp computes with it."""
        if self.entries[0].row.depth == 2:
            return list(x)
        if self.heads is not None:
            x = x.reshape(self.heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        x = x - np.float32(self.offset) if self.offset else x
        return [x.T if self.turned else x]


def tensors(convention: Convention, plan: Plan, config: Config, names: Any) -> Iterator[Tensor]:
    """All tensors of a model, in the order of the file.

    Args:
      names: gguf.TensorNameMap of the architecture.
    """
    pattern = plan.architecture.inputs_first
    stacks = itertools.groupby(
        plan.entries, lambda e: (e.row.name, e.index[:1]) if e.row.depth == 2 else e.name
    )
    for _, group in stacks:
        entries = tuple(group)
        first = entries[0]
        stacked = re.sub(r"\.experts\.\d+\.", ".experts.", first.name)
        name = names.get_name(stacked, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"gguf has no name for {first.name}")
        turned = pattern is not None and re.fullmatch(pattern, first.name) is not None
        shape = first.shape[::-1] if turned else first.shape
        shape = (len(entries), *shape) if first.row.depth == 2 else shape
        norm = convention.norm_offset and first.name.endswith("norm.weight")
        yield Tensor(
            name, shape, entries, turned,
            heads=_paired_heads(convention, first.name, config),
            offset=1.0 if norm else 0.0,
            factor=_query_factor(convention, first.name, config),
        )  # fmt: skip
    if convention.own_head and config.tie_embeddings:
        (embed,) = (e for e in plan.entries if e.row.paths == "embed")
        yield Tensor("output.weight", embed.shape, (embed,))


def _paired_heads(convention: Convention, name: str, config: Config) -> int | None:
    part = re.search(r"self_attn\.([qk])_proj\.", name)
    if part is None or not convention.rotated_pairs:
        return None
    return config.num_heads if part[1] == "q" else config.num_kv_heads


def _query_factor(convention: Convention, name: str, config: Config) -> float:
    """What the queries, or the norm that would undo it, are multiplied by where their scale is fixed."""
    if not convention.windows or (config.attention_scale is None and convention.odd_scale is None):
        return 1.0
    if not name.endswith("q_norm.weight" if config.qk_norm else "q_proj.weight"):
        return 1.0
    own = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return own / _own_scale(convention, flat(config))


def read_tensors(
    found: Sequence[Tensor], read: Callable[[str], np.ndarray]
) -> Callable[[str], np.ndarray]:
    """Hugging Face's tensors by name, out of GGUF's; experts of a layer are read once, in turn."""
    places = {entry.name: (tensor, i) for tensor in found for i, entry in enumerate(tensor.entries)}
    held: dict[str, list[np.ndarray]] = {}

    def get(name: str) -> np.ndarray:
        tensor, place = places[name]
        if tensor.name not in held:
            held.clear()
            held[tensor.name] = tensor.back(read(tensor.name))
        return held[tensor.name][place]

    return get
