"""Tiny models of every family, exported with a certificate as the command does it."""

from pathlib import Path

from random_models import random_model, run_of

from llm_jax.checkpoint.load import LoadedModel
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export.certified import export_certified
from llm_jax.models import bert, encoder_decoder, gpt
from llm_jax.nn.moe import MoeConfig

SIZES = {"vocab_size": 264, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_length": 160}
GPT2 = {
    "norm": "layernorm", "norm_bias": True, "position": "learned", "activation": "gelu_tanh",
    "gated": False, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
    "tie_embeddings": True,
}  # fmt: skip
LLAMA = {"num_kv_heads": 2}
GEMMA = {
    "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 80, "activation": "gelu_tanh",
    "norm_placement": "both", "norm_unit_offset": True, "scale_embeddings": True,
    "tie_embeddings": True, "attention_window": 7,
}  # fmt: skip
GEMMA2 = GEMMA | {
    "global_every": 2, "num_layers": 3, "attention_scale": 12**-0.5, "attention_soft_cap": 5.0,
    "final_soft_cap": 3.0,
}  # fmt: skip
GEMMA3 = GEMMA | {
    "global_every": 3, "num_layers": 4, "qk_norm": True, "rope_theta": 1000.0,
    "local_rope_theta": 100.0,
}  # fmt: skip
MIXTURE = MoeConfig(num_experts=5, experts_per_token=2, mlp_dim=32)
MIXTRAL = {"num_kv_heads": 2, "experts": MIXTURE}
ENCODER = {"vocab_size": 264, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64}
T5 = {
    **ENCODER, "max_length": 128, "position": "relative", "norm": "rmsnorm", "norm_bias": False,
    "norm_placement": "pre", "attention_bias": False, "mlp_bias": False, "attention_scale": 1.0,
    "scale_embeddings": False, "scale_outputs": True,
}  # fmt: skip
MODELS = {
    "gpt2": gpt.Config(**SIZES | GPT2),
    "llama": gpt.Config(**SIZES | LLAMA),
    "gemma": gpt.Config(**SIZES | GEMMA2),
    "mixtral": gpt.Config(**SIZES | MIXTRAL),
    "bert": bert.Config(**ENCODER, num_positions=160),
    "bert_classes": bert.Config(
        **ENCODER, num_positions=160, head="sequence_classification", num_labels=3
    ),
    "sentences": bert.Config(**ENCODER, num_positions=160, head="none"),
    "t5": encoder_decoder.Config(**T5),
}  # fmt: skip


def loaded_of(config, *, tokenizer=None, **fields) -> LoadedModel:
    """A random model as if it came from a checkpoint of step 3."""
    tokenizer = tokenizer or raw_bytes.make(raw_bytes.Config())
    model = random_model(config, **{"stddev": 0.1, **fields})
    return LoadedModel(model, run_of(config), tokenizer, 3)


def certified(exporter, loaded: LoadedModel, folder: Path, *, workdir=None) -> Path:
    return export_certified(
        exporter, lambda: loaded, folder, workdir=workdir, say=lambda text: None
    )
