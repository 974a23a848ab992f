"""The tables of models/gpt/hf.py against transformers: equal logits and tensors in both directions."""

import json

import jax
import numpy as np
import pytest
from decoder_cases import CASES, config_of, export, our_logits, params_of, random_model, tokens
from safetensors.numpy import load_file

from llm_jax.export import hf as export_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(architecture, model, folder) of one case."""
    model = random_model(config_of(request.param))
    folder = tmp_path_factory.mktemp(request.param) / "out"
    export(model, folder)
    return CASES[request.param][0], model, folder


def their_logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def test_transformers_computes_what_we_do(exported):
    architecture, model, folder = exported
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert theirs.config.model_type == architecture
    assert not any(report.values())
    ids = tokens(model.config.vocab_size)
    np.testing.assert_allclose(
        our_logits(model, ids), their_logits(theirs, ids), atol=1e-4, rtol=1e-5
    )


def test_import_then_export_gives_the_same_bytes(exported, tmp_path):
    _, model, folder = exported
    loaded, config = export_hf.load(folder)
    assert config == model.config
    wanted, found = params_of(model), params_of(loaded)
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, wanted, found)
    export(loaded, tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    configs = [json.loads((d / "config.json").read_text()) for d in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]


LLAMA_LIKE = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24}
LOCAL = "sliding_attention"
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    LOCAL: {"rope_type": "default", "rope_theta": 100.0},
}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
THEIR_CASES = {
    "gpt2": ("GPT2", {"vocab_size": 300, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 64}),
    "llama": ("Llama", LLAMA_LIKE),
    "llama_scaled": ("Llama", {**LLAMA_LIKE, **BIASED, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {**LLAMA_LIKE, "sliding_window": 7}),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen2_windows": (
        "Qwen2",
        {**LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("Gemma2", {**GEMMA_LIKE, "num_hidden_layers": 3, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {**GEMMA_LIKE, "num_hidden_layers": 3, "rope_parameters": GEMMA3_ROPE,
                              "layer_types": [LOCAL, "full_attention", LOCAL],
                              "final_logit_softcapping": 5.0}),
    "olmo2": ("Olmo2", {**LLAMA_LIKE, "attention_bias": True}),
    "mixtral": ("Mixtral", {**LLAMA_LIKE, "num_local_experts": 5}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA_LIKE, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 3,
                               "moe_intermediate_size": 24, "norm_topk_prob": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIR_CASES)
def test_we_compute_what_transformers_does(case, tmp_path):
    name, options = THEIR_CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options, initializer_range=0.2)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, _ = export_hf.load(tmp_path)
    ids = tokens(300)
    np.testing.assert_allclose(
        our_logits(ours, ids), their_logits(theirs, ids), atol=1e-4, rtol=1e-5
    )
