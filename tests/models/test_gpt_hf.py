"""The tables of models/gpt/hf.py against transformers: equal logits in both directions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import hf as export_hf
from llm_jax.models.gpt import Config, hf, make
from llm_jax.nn.moe import MoeConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.rope import RopeScaling
from llm_jax.training.config import resolve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 48
BASE = {"vocab_size": 300, "embed_dim": 48, "num_layers": 2, "num_heads": 6, "max_length": 64}
GPT2 = {
    "norm": "layernorm",
    "norm_bias": True,
    "position": "learned",
    "activation": "gelu_tanh",
    "gated": False,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}
BIASES = {"attention_bias": True, "attention_out_bias": True}
SCALING = RopeScaling(
    factor=4.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_max_length=16
)
CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_full_vocabulary": ("gpt2", {**GPT2, "vocab_size": 50257, "num_layers": 1}),
    "gpt2_untied_relu": ("gpt2", {**GPT2, "tie_embeddings": False, "activation": "relu"}),
    "gpt2_odd_mlp": ("gpt2", {**GPT2, "mlp_dim": 72, "norm_epsilon": 1e-3}),
    "llama": ("llama", {"rope_theta": 500.0}),
    "llama_grouped": ("llama", {"num_kv_heads": 2, "norm_epsilon": 1e-3}),
    "llama_head_dim": ("llama", {"num_kv_heads": 3, "head_dim": 16, "tie_embeddings": True}),
    "llama_biases": ("llama", {"num_kv_heads": 2, "mlp_bias": True, **BIASES}),
    "llama_scaled": ("llama", {"rope_scaling": SCALING, "rope_theta": 100.0}),
    "llama_gelu": ("llama", {"activation": "gelu", "num_layers": 1}),
    "qwen2": ("qwen2", {"num_kv_heads": 2, "attention_bias": True, "head_dim": 10}),
    "qwen3": ("qwen3", {"num_kv_heads": 2, "qk_norm": True}),
    "qwen3_head_dim": (
        "qwen3",
        {"embed_dim": 40, "head_dim": 16, "qk_norm": True, "rope_scaling": SCALING, **BIASES},
    ),
}


def random_model(config):
    """Biases and scales too are random, so that a wrong or missing one shows; no compilation."""
    abstract = nnx.eval_shape(lambda: make(config, precision=Precision(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def run_of(config):
    data = {
        "sources": [{"name": "text", "path": "unread.txt"}],
        "tokenizer": {"name": "raw_bytes"},
        "sequence_length": 16,
    }
    train = {"num_steps": 1, "batch_size": 1}
    return resolve({"model": dataclasses.asdict(config), "data": data, "train": train})


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(architecture, config, model, folder) of one case."""
    architecture, fields = CASES[request.param]
    config = Config(**(BASE | fields))
    model = random_model(config)
    exporter = export_hf.make(say=lambda text: None)
    folder = tmp_path_factory.mktemp(request.param) / "out"
    exporter.export(model, raw_bytes.make(raw_bytes.Config()), run_of(config), folder)
    return architecture, config, model, folder


def tokens(vocab_size):
    return np.random.default_rng(1).integers(0, vocab_size, (2, LENGTH))


@nnx.jit
def forward(model, ids):
    return model({"tokens": ids}).logits


def our_logits(model, ids):
    return np.asarray(forward(model, jnp.asarray(ids, jnp.int32)))


def their_logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def params_of(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_transformers_computes_what_we_do(exported):
    architecture, config, model, folder = exported
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert theirs.config.model_type == architecture
    assert not any(report.values())
    ids = tokens(config.vocab_size)
    np.testing.assert_allclose(
        our_logits(model, ids), their_logits(theirs, ids), atol=5e-5, rtol=1e-5
    )


@pytest.mark.parametrize("exported", ["gpt2", "llama_scaled", "qwen3"], indirect=True)
def test_transformers_generates_what_we_do(exported):
    _, config, model, folder = exported
    prompt, count = tokens(config.vocab_size)[:1, :8], 12
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.generation_config.eos_token_id = None
    wanted = theirs.generate(torch.tensor(prompt), do_sample=False, max_new_tokens=count).numpy()
    ids = np.zeros((1, 8 + count), np.int64)  # causality keeps what is not yet written out of sight
    ids[:, :8] = prompt
    for place in range(8, 8 + count):
        ids[:, place] = our_logits(model, ids)[:, place - 1].argmax(-1)
    np.testing.assert_array_equal(ids, wanted)


def test_import_of_an_export_is_the_same_model(exported):
    _, config, model, folder = exported
    loaded, loaded_config = export_hf.load(folder)
    assert loaded_config == config
    wanted, found = params_of(model), params_of(loaded)
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, wanted, found)


LLAMA_LIKE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
THEIR_CASES = {
    "gpt2": ("GPT2", {"vocab_size": 300, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 64}),
    "llama": ("Llama", LLAMA_LIKE),
    "llama_scaled": (
        "Llama",
        {
            **LLAMA_LIKE,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, "head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIR_CASES)
def test_we_compute_what_transformers_does(case, tmp_path):
    name, options = THEIR_CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options, initializer_range=0.2)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    theirs = getattr(transformers, name + head)(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, _ = export_hf.load(tmp_path)
    ids = tokens(300)
    np.testing.assert_allclose(
        our_logits(ours, ids), their_logits(theirs, ids), atol=5e-5, rtol=1e-5
    )


def test_gpt2_config_by_values():
    config = Config(
        vocab_size=50257, embed_dim=768, num_layers=12, num_heads=12, max_length=1024, dropout=0.1,
        **GPT2,
    )  # fmt: skip
    theirs = transformers.GPT2Config(**hf.hf_config(config, bos_id=50256, eos_id=50256))
    default = transformers.GPT2Config()
    for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "activation_function",
                "layer_norm_epsilon", "tie_word_embeddings", "bos_token_id", "eos_token_id",
                "resid_pdrop", "embd_pdrop", "scale_attn_weights"):  # fmt: skip
        assert getattr(theirs, key) == getattr(default, key), key
    assert theirs.n_inner == 4 * 768
    # The file of the original checkpoint says little and leaves n_inner to the reader.
    published = {
        "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1, "n_inner": None,
    }  # fmt: skip
    assert hf.config_from_hf(published) == config


def test_llama_3_config_by_values():
    published = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16", "vocab_size": 128256,
    }  # fmt: skip
    config = hf.config_from_hf(published)
    assert config == Config(
        vocab_size=128256, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        mlp_dim=14336, max_length=131072, rope_theta=500_000.0, rope_scaling=RopeScaling(),
    )  # fmt: skip
    written = hf.hf_config(config)
    assert {k: written[k] for k in published if k in written} == {
        k: published[k] for k in published if k in written
    } | {"torch_dtype": "float32"}


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
        ({"num_heads": 5, "head_dim": 8}, "embed_dim"),
    ],
)
def test_a_model_that_hugging_face_lacks_is_refused_by_field(fields, named):
    with pytest.raises(ConfigError, match=f"model.{named} = ") as error:
        hf.architecture_for(Config(**(BASE | fields)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bloom"}, "model_type = 'bloom'.*gpt2, llama"),
        ({"hidden_act": "mish"}, "mish"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "num_kv_heads 4"),
        ({"hidden_size": "48"}, "embed_dim"),
    ],
)
def test_an_option_that_we_cannot_compute_is_refused_by_name(changes, named):
    content = {"model_type": "llama", **LLAMA_LIKE, **changes}
    with pytest.raises(ConfigError, match=named):
        hf.config_from_hf(content)


def test_padding_id_is_left_out_of_the_model_when_it_is_a_token_in_use():
    config = Config(**BASE)
    assert hf.hf_config(config, bos_id=1, eos_id=2, pad_id=0)["pad_token_id"] == 0
    assert hf.hf_config(config, bos_id=2, eos_id=2, pad_id=2)["pad_token_id"] is None


@pytest.mark.parametrize("architecture", hf.ARCHITECTURES)
def test_defaults_of_the_table_are_those_of_transformers(architecture):
    theirs = transformers.AutoConfig.for_model(architecture)
    for ours, key, default in hf.ARCHITECTURES[architecture].fields:
        if default is not None:
            assert getattr(theirs, key) == default, (ours, key)
    filled = hf.config_from_hf({"model_type": architecture})
    explicit = hf.config_from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    assert filled == explicit


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": MoeConfig(num_experts=4, mlp_dim=16)},
        {"attention_window": 8},
        {"attention_soft_cap": 50.0},
    ],
)
def test_what_no_architecture_has_is_not_exported(changes):
    config = Config(**BASE, **changes)
    with pytest.raises(ConfigError, match=f"no place for model.{next(iter(changes))}"):
        hf.architecture_for(config)
