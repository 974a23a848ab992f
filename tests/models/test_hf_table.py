"""config.json of decoders: published ones, what is written, and what is refused."""

import dataclasses
import json

import pytest
from decoder_cases import BASE, CASES, GEMMA3, GPT2, config_of

from llm_jax.core.config import ConfigError, load, parse_component
from llm_jax.models.gpt import Config
from llm_jax.models.gpt.hf import FAMILY
from llm_jax.models.hf_table import Plan, Row, flat
from llm_jax.nn.moe import MoeConfig
from llm_jax.nn.rope import RopeScaling

GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": [1, 107],
    "cache_implementation": "hybrid", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "transformers_version": "4.50.0",
    "use_cache": True,
}  # fmt: skip
LLAMA = {
    "_name_or_path": "x/y", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "num_attention_heads": 32, "num_hidden_layers": 32,
    "hidden_size": 4096, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
}  # fmt: skip
QWEN3 = {
    **LLAMA, "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
# config.json as on the hub, by the file in configs/ that is to be the same model.
PUBLISHED = {
    "llama2_7b": {
        **LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rope_scaling": None, "vocab_size": 32000,
    },
    "llama3_8b": {
        **LLAMA, "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 500000.0, "vocab_size": 128256,
    },
    "mistral_7b": {
        **LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
    },
    "gemma2_9b": {
        **GEMMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "vocab_size": 256000,
    },
    "gemma3_4b": {
        **GEMMA, "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "hidden_size": 2560, "intermediate_size": 10240,
        "max_position_embeddings": 131072, "num_attention_heads": 8, "num_hidden_layers": 34,
        "num_key_value_heads": 4, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000.0,
        "sliding_window": 1024, "sliding_window_pattern": 6, "vocab_size": 262208,
    },
    "olmo2_7b": {
        **LLAMA, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_key_value_heads": 32,
        "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "vocab_size": 100352,
    },
    "mixtral_8x7b": {
        **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "vocab_size": 32000,
    },
    "qwen3_8b": {
        **QWEN3, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
        "intermediate_size": 12288, "max_window_layers": 36, "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3_moe_30b_a3b": {
        **QWEN3, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_configs_are_the_published_models(name):
    section = load(f"configs/{name}.py").model
    wanted = parse_component("models", section, "config.model")
    found = FAMILY.config_from_hf(PUBLISHED[name])
    assert found == dataclasses.replace(wanted, remat="none", init_stddev=found.init_stddev)
    written = FAMILY.hf_config(found)
    assert FAMILY.config_from_hf(json.loads(json.dumps(written))) == found
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    for key in PUBLISHED[name].keys() & written.keys() - {"architectures", "torch_dtype"} - ids:
        assert written[key] == PUBLISHED[name][key], key


def test_gpt2_as_published():
    """The file of the original checkpoint says little and leaves n_inner to the reader."""
    published = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }  # fmt: skip
    assert FAMILY.config_from_hf(published) == Config(
        50257, 768, 12, 12, max_length=1024, dropout=0.1, mlp_dim=3072, **GPT2
    )


@pytest.mark.parametrize("model_type", FAMILY.model_types)
def test_defaults_of_the_table_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    for field in FAMILY.architecture_of({"model_type": model_type}).fields:
        if field.default is not None:
            assert getattr(theirs, field.key) == field.default, field
    filled = FAMILY.config_from_hf({"model_type": model_type})
    explicit = FAMILY.config_from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    assert filled == explicit


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_write(case):
    transformers = pytest.importorskip("transformers")
    content = FAMILY.hf_config(config_of(case))
    config = transformers.AutoConfig.for_model(**content)
    again = json.loads(config.to_json_string(use_diff=False))
    assert FAMILY.config_from_hf(again) == config_of(case)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"position": "none"}, "position"),
        ({"gated": False}, "gated"),
        ({"norm": "layernorm"}, "norm"),
        ({"attention_out_bias": True}, "attention_out_bias"),
        ({**GPT2, "num_kv_heads": 2}, "num_kv_heads"),
        ({**GPT2, "head_dim": 4}, "head_dim"),
        ({**GPT2, "norm_bias": False}, "norm_bias"),
        ({"num_heads": 5, "head_dim": 8, "mlp_bias": True}, "embed_dim"),
        ({"attention_soft_cap": 50.0}, "attention_soft_cap"),
        ({"norm_placement": "post"}, "norm_placement"),
        ({"attention_window": 8, "global_every": 2}, "global_every"),
        ({**GEMMA3, "attention_scale": 0.3}, "attention_scale"),
        ({**GEMMA3, "final_soft_cap": 3.0, "attention_soft_cap": 5.0}, "attention_soft_cap"),
        ({"experts": MoeConfig(num_experts=4, mlp_dim=16, gated=False)}, "experts.gated"),
        ({"experts": MoeConfig(num_experts=4, mlp_dim=16, shared_dim=8)}, "experts.shared_dim"),
    ],
)
def test_a_model_that_hugging_face_lacks_is_refused_by_field(fields, named):
    with pytest.raises(ConfigError, match=f"no place for .*model.{named} = ") as error:
        FAMILY.architecture_for(Config(**(BASE | fields)))
    assert "\n" not in str(error.value)


def test_values_that_transformers_does_not_take():
    gemma3 = FAMILY.architecture_of({"model_type": "gemma3_text"})
    fields = (
        BASE | GEMMA3 | {"local_rope_theta": None, "attention_window": None, "global_every": None}
    )
    assert gemma3.obstacles(Config(**fields)) == {
        "local_rope_theta": 1000.0,
        "attention_window": 4096,
    }


LLAMA_LIKE = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2_LIKE = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 6}
GEMMA_LIKE = {**LLAMA_LIKE, "model_type": "gemma3_text"}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({**LLAMA_LIKE, "model_type": "bloom"}, "model_type = 'bloom'.*gpt2, llama, mistral"),
        ({**LLAMA_LIKE, "hidden_act": "mish"}, "hidden_act = 'mish'.*choices: gelu"),
        ({**LLAMA_LIKE, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({**LLAMA_LIKE, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
        ({**LLAMA_LIKE, "rope_scaling": {"type": "linear"}}, "linear rope lacks factor"),
        ({**LLAMA_LIKE, "rope_scaling": {"type": "linear", "factor": 0}}, "must be positive"),
        ({**LLAMA_LIKE, "rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2'"),
        ({**LLAMA_LIKE, "rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({**LLAMA_LIKE, "rope_parameters": {"mrope_section": [1]}}, "mrope_section"),
        ({**LLAMA_LIKE, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA_LIKE, "layer_types": [GLOBAL] * 4}, "not understood for LlamaFor.*layer_types"),
        ({**LLAMA_LIKE, "attention_multiplier": 0.2}, "attention_multiplier = 0.2"),
        ({**LLAMA_LIKE, "auto_map": {"a": "b"}}, "auto_map = "),
        ({**LLAMA_LIKE, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA_LIKE, "is_decoder": True}, "is_decoder = True"),
        ({**LLAMA_LIKE, "num_key_value_heads": 4}, "num_kv_heads 4"),
        ({**LLAMA_LIKE, "hidden_size": "48"}, "hidden_size = '48': expected a whole number from 1"),
        ({**LLAMA_LIKE, "num_attention_heads": 0}, "num_attention_heads = 0"),
        ({**LLAMA_LIKE, "attention_bias": 1}, "attention_bias = 1: expected true or false"),
        ({**LLAMA_LIKE, "rms_norm_eps": "small"}, "rms_norm_eps = 'small': expected a number"),
        ({**LLAMA_LIKE, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
         "layer_types = "),
        ({**LLAMA_LIKE, "model_type": "qwen3", "layer_types": [LOCAL] * 4}, "there is no window"),
        ({**LLAMA_LIKE, "model_type": "qwen3", "layer_types": [GLOBAL] * 3}, "has 3 layers.* 4"),
        ({**LLAMA_LIKE, "model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 4},
         "contradicts itself: num_experts = 8, num_local_experts = 4"),
        ({**LLAMA_LIKE, "model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({**LLAMA_LIKE, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({**LLAMA_LIKE, "model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({**GEMMA_LIKE, "layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL]}, "every n-th layer"),
        ({**GEMMA_LIKE, "sliding_window_pattern": "6"}, "sliding_window_pattern = '6'"),
        ({**GEMMA_LIKE, "query_pre_attn_scalar": None}, "query_pre_attn_scalar = None"),
        ({**GEMMA_LIKE, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({**GEMMA_LIKE, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({**GEMMA_LIKE, "rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
         "rotary positions"),
        ({**GPT2_LIKE, "scale_attn_weights": False}, "scale_attn_weights"),
        ({**GPT2_LIKE, "add_cross_attention": True}, "add_cross_attention"),
    ],
)  # fmt: skip
def test_what_we_cannot_compute_is_refused_by_key_and_value(content, named):
    with pytest.raises(ConfigError, match=named) as error:
        FAMILY.config_from_hf(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "window", "every"),
    [
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": False}, None, None),
        ("qwen2", {"use_sliding_window": True}, None, None),  # from layer 28 on, and there are 4
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096, None),
        ("qwen3", {"use_sliding_window": True, "layer_types": [LOCAL, GLOBAL] * 2}, 4096, 2),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, 8, None),
        ("mistral", {"sliding_window": None}, None, None),
        ("gemma2", {}, 4096, 2),
        ("gemma3_text", {"layer_types": [LOCAL] * 4, "_sliding_window_pattern": 6}, 4096, 6),
        ("gemma3_text", {"layer_types": [LOCAL] * 4, "sliding_window_pattern": None}, 4096, None),
        ("gemma3_text", {"layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL]}, 4096, 3),
    ],
)
def test_which_layers_have_a_window(model_type, changes, window, every):
    config = FAMILY.config_from_hf({**LLAMA_LIKE, "model_type": model_type, **changes})
    assert (config.attention_window, config.global_every) == (window, every)


def test_rope_under_the_keys_of_either_version():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    old = {"rope_theta": 5e5, "rope_scaling": scaling}
    new = {"rope_parameters": {"rope_theta": 5e5, **scaling}}
    for content in (old, new, old | new):
        config = FAMILY.config_from_hf(LLAMA_LIKE | content)
        assert config.rope_theta == 5e5
        assert config.rope_scaling == RopeScaling(original_max_length=64)


def test_padding_id_is_left_out_of_the_model_when_it_is_a_token_in_use():
    config = Config(**BASE)
    assert FAMILY.hf_config(config, bos_id=1, eos_id=2, pad_id=0)["pad_token_id"] == 0
    assert FAMILY.hf_config(config, bos_id=2, eos_id=2, pad_id=2)["pad_token_id"] is None


def test_differences_leave_out_what_only_training_sees():
    config = config_of("mixtral")
    experts = dataclasses.replace(config.experts, load_balance=0.5, router_z=0.0)
    free = dataclasses.replace(config, dropout=0.1, remat="full", max_length=8, experts=experts)
    architecture = FAMILY.architecture_for(config)
    assert FAMILY.differences(architecture, free, config) == {}
    experts = dataclasses.replace(experts, experts_per_token=1)
    other = dataclasses.replace(free, rope_theta=5.0, experts=experts)
    assert FAMILY.differences(architecture, other, config) == {
        "rope_theta": (5.0, 10_000.0), "experts.experts_per_token": (1, 2),
    }  # fmt: skip
    assert flat(config)["experts.mlp_dim"] == config.experts.mlp_dim


def test_stacks_of_unequal_depth_and_experts_go_layer_by_layer():
    rows = (
        Row("embed", "V D", "shared", "V D"),
        Row("a.layers.up", "D F", "a.{}.up", "F D"),
        Row("a.layers.experts", "E D F", "a.{}.e.{}.up", "F D"),
        Row("b.layers.up", "D F", "b.{}.up", "F D"),
        Row("b.layers.absent", "D", "b.{}.absent", "D"),
    )
    architecture = dataclasses.replace(FAMILY.architectures[0], tensors=rows)
    shapes = {"embed": (7, 4), "a.layers.up": (2, 4, 5), "a.layers.experts": (2, 3, 4, 5),
              "b.layers.up": (1, 4, 5)}  # fmt: skip
    plan = Plan.of(architecture, {"V": 7, "D": 4, "F": 5, "E": 3}, shapes)
    assert [(entry.name, entry.index) for entry in plan.entries] == [
        ("shared", ()),
        ("a.0.up", (0,)), ("a.0.e.0.up", (0, 0)), ("a.0.e.1.up", (0, 1)), ("a.0.e.2.up", (0, 2)),
        ("a.1.up", (1,)), ("a.1.e.0.up", (1, 0)), ("a.1.e.1.up", (1, 1)), ("a.1.e.2.up", (1, 2)),
        ("b.0.up", (0,)),
    ]  # fmt: skip
    assert {entry.shape for entry in plan.entries[1:]} == {(5, 4)}
    with pytest.raises(ValueError, match=r"no GPT2LMHeadModel name for b\.layers\.more"):
        Plan.of(architecture, {}, shapes | {"b.layers.more": (1, 4)})
