"""Decoders of Hugging Face: names, layouts and configs, for both directions.

How to read the tables: models/hf_table.py. GPT-2 keeps query, key and value side by side in one
tensor: there three of our paths make one, along "3".

Source: transformers 5.23, models/{gpt2,llama,mistral,qwen2,qwen3,gemma2,gemma3,olmo2,mixtral,qwen3_moe}; the
names of experts are those of checkpoints, which transformers 5 packs in memory and writes as they were.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.models.gpt.config import Config
from llm_jax.models.gpt.hf_windows import everywhere, in_layer_types, in_upper_layers
from llm_jax.models.hf_config import ACTIVATIONS, Field, Group, local_rope, rope, value_of
from llm_jax.models.hf_table import Architecture, Family, Row, in_blocks

# What an architecture has unless its table says otherwise.
_PLAIN = {
    "norm": "rmsnorm",
    "norm_bias": False,
    "norm_placement": "pre",
    "norm_unit_offset": False,
    "position": "rotary",
    "local_rope_theta": None,
    "gated": True,
    "experts": None,
    "attention_bias": False,
    "attention_out_bias": lambda values: values["attention_bias"],
    "mlp_bias": False,
    "qk_norm": False,
    "qk_norm_over": "head",
    "attention_scale": None,
    "attention_window": None,
    "global_every": None,
    "attention_soft_cap": None,
    "final_soft_cap": None,
    "scale_embeddings": False,
}

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


def _read_inner(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    inner = value_of(content, "n_inner", 4 * values["embed_dim"])
    return {"mlp_dim": 4 * values["embed_dim"] if inner is None else inner}


GPT2 = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    fields=(
        Field("vocab_size", "vocab_size", 50257),
        Field("embed_dim", "n_embd", 768),
        Field("num_layers", "n_layer", 12),
        Field("num_heads", "n_head", 12),
        Field("max_length", "n_positions", 1024),
        Field("activation", "activation_function", "gelu_new", names=ACTIVATIONS),
        Field("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout", "resid_pdrop", 0.1),
        Field("init_stddev", "initializer_range", 0.02),
    ),
    groups=(
        Group(("n_inner",), ("mlp_dim",), _read_inner, lambda values: {"n_inner": values["mlp_dim"]}),
    ),
    fixed=_PLAIN
    | {
        "norm": "layernorm",
        "norm_bias": True,
        "position": "learned",
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "num_kv_heads": lambda values: values["num_heads"],
        "head_dim": lambda values: values["embed_dim"] / values["num_heads"],
    },
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    written={"attn_pdrop": 0.0},
    ignored=frozenset({
        "n_ctx", "embd_pdrop", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    }),
    prefix="transformer.",
    skipped=r"h\.\d+\.attn\.(bias|masked_bias)",
    copies={"lm_head.weight": "transformer.wte.weight"},
    inputs_first=r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight",  # its Conv1D
    tensors=(
        Row("embed", "V D", "transformer.wte.weight", "V D"),
        Row("position_embed", "T D", "transformer.wpe.weight", "T D"),
        *in_blocks("stack.layers.", "transformer.h.{}.", _GPT2_BLOCK),
        Row("final_norm.scale", "D", "transformer.ln_f.weight", "D"),
        Row("final_norm.bias", "D", "transformer.ln_f.bias", "D"),
        Row("head", "D V", "lm_head.weight", "V D"),
    ),
)  # fmt: skip

_ATTENTION = (
    Row("attention.query", "D N H", "self_attn.q_proj.weight", "(N H) D"),
    Row("attention.key", "D K H", "self_attn.k_proj.weight", "(K H) D"),
    Row("attention.value", "D K H", "self_attn.v_proj.weight", "(K H) D"),
    Row("attention.query_bias", "N H", "self_attn.q_proj.bias", "(N H)"),
    Row("attention.key_bias", "K H", "self_attn.k_proj.bias", "(K H)"),
    Row("attention.value_bias", "K H", "self_attn.v_proj.bias", "(K H)"),
    Row("attention.out", "N H D", "self_attn.o_proj.weight", "D (N H)"),
    Row("attention.out_bias", "D", "self_attn.o_proj.bias", "D"),
)
_HEAD_NORMS = (
    Row("attention.query_norm.scale", "H", "self_attn.q_norm.weight", "H"),
    Row("attention.key_norm.scale", "H", "self_attn.k_norm.weight", "H"),
)
_NORMS_BEFORE = (
    Row("attention_norm.scale", "D", "input_layernorm.weight", "D"),
    Row("mlp_norm.scale", "D", "post_attention_layernorm.weight", "D"),
)
_NORMS_AROUND = (
    Row("attention_norm.scale", "D", "input_layernorm.weight", "D"),
    Row("attention_out_norm.scale", "D", "post_attention_layernorm.weight", "D"),
    Row("mlp_norm.scale", "D", "pre_feedforward_layernorm.weight", "D"),
    Row("mlp_out_norm.scale", "D", "post_feedforward_layernorm.weight", "D"),
)
_MLP = (
    Row("mlp.gate", "D F", "mlp.gate_proj.weight", "F D"),
    Row("mlp.gate_bias", "F", "mlp.gate_proj.bias", "F"),
    Row("mlp.up", "D F", "mlp.up_proj.weight", "F D"),
    Row("mlp.up_bias", "F", "mlp.up_proj.bias", "F"),
    Row("mlp.down", "F D", "mlp.down_proj.weight", "D F"),
    Row("mlp.down_bias", "D", "mlp.down_proj.bias", "D"),
)
_MIXTRAL_MOE = (
    Row("mlp.router", "D E", "block_sparse_moe.gate.weight", "E D"),
    Row("mlp.gate", "E D F", "block_sparse_moe.experts.{}.w1.weight", "F D"),
    Row("mlp.down", "E F D", "block_sparse_moe.experts.{}.w2.weight", "D F"),
    Row("mlp.up", "E D F", "block_sparse_moe.experts.{}.w3.weight", "F D"),
)
_QWEN_MOE = (
    Row("mlp.router", "D E", "mlp.gate.weight", "E D"),
    Row("mlp.gate", "E D F", "mlp.experts.{}.gate_proj.weight", "F D"),
    Row("mlp.up", "E D F", "mlp.experts.{}.up_proj.weight", "F D"),
    Row("mlp.down", "E F D", "mlp.experts.{}.down_proj.weight", "D F"),
)


def _tensors(*parts: Sequence[Row]) -> tuple[Row, ...]:
    """Of a whole model whose blocks are made of these rows."""
    return (
        Row("embed", "V D", "model.embed_tokens.weight", "V D"),
        *in_blocks("stack.layers.", "model.layers.{}.", [row for part in parts for row in part]),
        Row("final_norm.scale", "D", "model.norm.weight", "D"),
        Row("head", "D V", "lm_head.weight", "V D"),
    )


def _with(fields: Sequence[Field], *without: str, **defaults: Any) -> tuple[Field, ...]:
    """The fields with other defaults, by key, and less those that are not there."""
    return tuple(
        dataclasses.replace(field, default=defaults.get(field.key, field.default))
        for field in fields
        if field.key not in without
    )


_LLAMA_FIELDS = (
    Field("vocab_size", "vocab_size", 32000),
    Field("embed_dim", "hidden_size", 4096),
    Field("num_layers", "num_hidden_layers", 32),
    Field("num_heads", "num_attention_heads", 32),
    Field("num_kv_heads", "num_key_value_heads", None),
    Field("head_dim", "head_dim", None),
    Field("mlp_dim", "intermediate_size", 11008),
    Field("max_length", "max_position_embeddings", 2048),
    Field("activation", "hidden_act", "silu", names=ACTIVATIONS),
    Field("norm_epsilon", "rms_norm_eps", 1e-6),
    Field("tie_embeddings", "tie_word_embeddings", False),
    Field("attention_bias", "attention_bias", False),
    Field("mlp_bias", "mlp_bias", False),
    Field("init_stddev", "initializer_range", 0.02),
)
# LlamaConfig and the configs of Gemma refuse another size, even where head_dim makes it harmless.
_WHOLE_HEADS = {"embed_dim": lambda values: values["embed_dim"] // values["num_heads"] * values["num_heads"]}  # fmt: skip

LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    fields=_LLAMA_FIELDS,
    groups=(rope(),),
    fixed=_PLAIN,
    limits=_WHOLE_HEADS,
    written={"attention_dropout": 0.0},
    ignored=frozenset({"pretraining_tp"}),
    prefix="model.",
    skipped=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    tensors=_tensors(_NORMS_BEFORE, _ATTENTION, _HEAD_NORMS, _MLP),
)

_MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
}
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    fields=(
        *_with(_LLAMA_FIELDS, "attention_bias", "mlp_bias", **_MISTRAL_DEFAULTS),
        Field("attention_window", "sliding_window", 4096),
    ),
    limits={},
    ignored=frozenset(),
)


_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
}

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    fields=_with(_LLAMA_FIELDS, "attention_bias", "mlp_bias", **_QWEN_DEFAULTS),
    groups=(rope(), in_upper_layers()),
    fixed=_PLAIN | {"attention_bias": True, "attention_out_bias": False},
    # A period that is longer than the model cannot be seen from its layers.
    limits={
        "global_every": lambda values: (
            values["global_every"]
            if (values["global_every"] or 0) <= values["num_layers"]
            else None
        )
    },
    ignored=frozenset(),
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    fields=_with(_LLAMA_FIELDS, "mlp_bias", head_dim=128, **_QWEN_DEFAULTS),
    fixed=_PLAIN | {"qk_norm": True},
)


def _read_scalar(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    scalar = value_of(content, "query_pre_attn_scalar", 256)
    if scalar is None:
        raise ConfigError("config.json: query_pre_attn_scalar = None: expected a whole number")
    return {"attention_scale": scalar**-0.5}


def _scalar(values: Mapping[str, Any]) -> int:
    scale = values["attention_scale"]
    return values["head_dim"] if scale is None else max(1, round(scale**-2))


_QUERY_SCALAR = Group(
    ("query_pre_attn_scalar",),
    ("attention_scale",),
    _read_scalar,
    lambda values: {"query_pre_attn_scalar": _scalar(values)},
)
_GEMMA_FIXED = _PLAIN | {
    "norm_placement": "both",
    "norm_unit_offset": True,
    "scale_embeddings": True,
}
_GEMMA_ACTIVATIONS = ACTIVATIONS | {"gelu_tanh": ("gelu_pytorch_tanh", *ACTIVATIONS["gelu_tanh"])}

GEMMA2 = dataclasses.replace(
    LLAMA,
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    fields=(
        *_with(
            _LLAMA_FIELDS, "hidden_act", "mlp_bias",
            vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256,
            max_position_embeddings=8192, tie_word_embeddings=True,
        ),
        Field("activation", "hidden_activation", "gelu_pytorch_tanh", names=_GEMMA_ACTIVATIONS),
        Field("attention_soft_cap", "attn_logit_softcapping", 50.0),
        Field("final_soft_cap", "final_logit_softcapping", 30.0),
    ),
    groups=(rope(), _QUERY_SCALAR, in_layer_types(every=2)),
    fixed=_GEMMA_FIXED,
    limits=_WHOLE_HEADS
    | {
        # transformers has it as a whole number, and no layer types without a window.
        "attention_scale": lambda values: values["attention_scale"] and _scalar(values) ** -0.5,
        "attention_window": lambda values: values["attention_window"] or 4096,
    },
    only={"use_bidirectional_attention": False},
    ignored=frozenset({"hidden_act", "sliding_window_size"}),
    tensors=_tensors(_NORMS_AROUND, _ATTENTION, _HEAD_NORMS, _MLP),
)  # fmt: skip

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    fields=_with(
        GEMMA2.fields, "attn_logit_softcapping",
        vocab_size=262208, max_position_embeddings=131072, final_logit_softcapping=None,
    ),
    groups=(local_rope(1_000_000.0, 10_000.0), _QUERY_SCALAR, in_layer_types(every=6)),
    fixed=_GEMMA_FIXED | {"qk_norm": True},
    limits=GEMMA2.limits
    | {"local_rope_theta": lambda values: values["local_rope_theta"] or values["rope_theta"]},
    only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ignored=frozenset(),
)  # fmt: skip

OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    fields=_with(_LLAMA_FIELDS, "mlp_bias", vocab_size=50304, rms_norm_eps=1e-5),
    fixed=_PLAIN | {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads"},
    limits={},
    ignored=frozenset(),
    tensors=_tensors(
        (
            Row("attention_norm.scale", "D", "post_attention_layernorm.weight", "D"),
            Row("mlp_norm.scale", "D", "post_feedforward_layernorm.weight", "D"),
            Row("attention.query_norm.scale", "(N H)", "self_attn.q_norm.weight", "(N H)"),
            Row("attention.key_norm.scale", "(K H)", "self_attn.k_norm.weight", "(K H)"),
        ),
        _ATTENTION,
        _MLP,
    ),
)

_SPARSE = {key: value for key, value in _PLAIN.items() if key != "experts"} | {
    "mlp_dim": None,
    "activation": "silu",
    "experts.gated": True,
    "experts.shared_dim": None,
}


def _experts(count: str, mlp_dim: str) -> tuple[Field, ...]:
    """Of every mixture, with Mixtral's defaults; transformers has two names for their number."""
    also = {"num_experts", "num_local_experts"} - {count}
    return (
        Field("experts.num_experts", count, 8, also=tuple(also)),
        Field("experts.mlp_dim", mlp_dim, 14336),
        Field("experts.experts_per_token", "num_experts_per_tok", 2),
        Field("experts.activation", "hidden_act", "silu", names=ACTIVATIONS),
        Field("experts.load_balance", "router_aux_loss_coef", 0.001),
    )


MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    fields=(
        *_with(
            MISTRAL.fields, "hidden_act", "intermediate_size", rms_norm_eps=1e-5, sliding_window=None
        ),
        *_experts("num_local_experts", "intermediate_size"),
    ),
    groups=(rope(1_000_000.0),),
    fixed=_SPARSE | {"experts.normalize_weights": True},
    only={"router_jitter_noise": 0.0},
    ignored=frozenset({"output_router_logits"}),
    tensors=_tensors(_NORMS_BEFORE, _ATTENTION, _MIXTRAL_MOE),
)  # fmt: skip

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    fields=(
        *_with(
            _LLAMA_FIELDS, "hidden_act", "intermediate_size", "mlp_bias",
            vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_key_value_heads=4,
            max_position_embeddings=32768,
        ),
        *_with(
            _experts("num_experts", "moe_intermediate_size"),
            num_experts=128, moe_intermediate_size=768, num_experts_per_tok=8,
        ),
        Field("experts.normalize_weights", "norm_topk_prob", False),
    ),
    groups=(rope(), everywhere()),
    fixed=_SPARSE | {"qk_norm": True},
    only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    # intermediate_size is that of layers without experts, of which there are none.
    written={"attention_dropout": 0.0, "intermediate_size": 6144},
    ignored=frozenset({"output_router_logits", "max_window_layers"}),
    tensors=_tensors(_NORMS_BEFORE, _ATTENTION, _HEAD_NORMS, _QWEN_MOE),
)  # fmt: skip


def _sizes(config: Config) -> dict[str, int]:
    """What the letters of the tables stand for."""
    return {
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.experts.mlp_dim if config.experts else config.mlp_dim,
        "E": config.experts.num_experts if config.experts else 0,
        "V": config.vocab_size,
        "T": config.max_length,
        "3": 3,
    }


FAMILY = Family(
    name="gpt",
    config=Config,
    architectures=(GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, MIXTRAL, QWEN3_MOE),
    sizes=_sizes,
    free=frozenset(
        {
            "max_length",
            "dropout",
            "remat",
            "scan_unroll",
            "init_stddev",
            "experts.load_balance",
            "experts.router_z",
            "experts.capacity_factor",
            "experts.round_factor",
        }
    ),
)
