"""Decoders of every architecture that Hugging Face has and we compute, tiny, with random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import hf as export_hf
from llm_jax.models.gpt import Config, make
from llm_jax.nn.moe import MoeConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.rope import RopeScaling
from llm_jax.training.config import resolve

BASE = {"vocab_size": 300, "embed_dim": 48, "num_layers": 2, "num_heads": 6, "max_length": 64}
GPT2 = {
    "norm": "layernorm", "norm_bias": True, "position": "learned", "activation": "gelu_tanh",
    "gated": False, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
    "tie_embeddings": True,
}  # fmt: skip
BIASES = {"attention_bias": True, "attention_out_bias": True}
SCALING = RopeScaling(
    factor=4.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_max_length=16
)
GROUPED = {"num_kv_heads": 2}
GEMMA = {
    **GROUPED, "head_dim": 16, "mlp_dim": 80, "activation": "gelu_tanh", "norm_epsilon": 1e-3,
    "norm_placement": "both", "norm_unit_offset": True, "scale_embeddings": True,
    "tie_embeddings": True, "attention_window": 7,
}  # fmt: skip
GEMMA2 = {
    **GEMMA, "global_every": 2, "num_layers": 3, "attention_scale": 12**-0.5,
    "attention_soft_cap": 5.0, "final_soft_cap": 3.0,
}  # fmt: skip
GEMMA3 = {
    **GEMMA, "global_every": 3, "num_layers": 4, "qk_norm": True, "rope_theta": 1000.0,
    "local_rope_theta": 100.0,
}  # fmt: skip
OLMO2 = {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads"}
MIXTURE = {"num_experts": 5, "experts_per_token": 2, "mlp_dim": 24, "load_balance": 0.02}

CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_full_vocabulary": ("gpt2", {**GPT2, "vocab_size": 50257, "num_layers": 1}),
    "gpt2_untied": (
        "gpt2",
        {**GPT2, "tie_embeddings": False, "activation": "relu", "mlp_dim": 72, "norm_epsilon": 1e-3},
    ),
    "llama": (
        "llama",
        {"rope_scaling": RopeScaling("linear", factor=2.0), "rope_theta": 500.0, "activation": "gelu"},
    ),
    "llama_head_dim": ("llama", {"num_kv_heads": 3, "head_dim": 16, "tie_embeddings": True}),
    "llama_biases": ("llama", {**GROUPED, "mlp_bias": True, "norm_epsilon": 1e-3, **BIASES}),
    "llama_scaled": ("llama", {"rope_scaling": SCALING, "rope_theta": 100.0}),
    "mistral": ("mistral", {**GROUPED, "attention_window": 7, "head_dim": 10}),
    "qwen2": ("qwen2", {**GROUPED, "attention_bias": True, "head_dim": 10}),
    "qwen2_windows": (
        "qwen2",
        {**GROUPED, "attention_bias": True, "attention_window": 9, "global_every": 2},
    ),
    "qwen3": ("qwen3", {**GROUPED, "qk_norm": True}),
    "qwen3_head_dim": (
        "qwen3",
        {"embed_dim": 40, "head_dim": 16, "qk_norm": True, "rope_scaling": SCALING, **BIASES},
    ),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3_scaled": (
        "gemma3_text",
        {**GEMMA3, "global_every": 2, "rope_scaling": RopeScaling("linear", factor=8.0)},
    ),
    "olmo2": ("olmo2", {**GROUPED, **OLMO2, **BIASES}),
    "mixtral": (
        "mixtral",
        {**GROUPED, "head_dim": 16, "attention_window": 5, "experts": MoeConfig(**MIXTURE)},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **GROUPED, "head_dim": 16, "qk_norm": True,
            "experts": MoeConfig(**MIXTURE | {"experts_per_token": 3, "normalize_weights": False}),
        },
    ),
}  # fmt: skip


def config_of(case: str) -> Config:
    return Config(**(BASE | CASES[case][1]))


def random_model(config: Config):
    """Biases and scales too are random, so that a wrong or missing one shows; no compilation."""
    abstract = nnx.eval_shape(lambda: make(config, precision=Precision(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def run_of(config: Config):
    data = {
        "sources": [{"name": "text", "path": "unread.txt"}],
        "tokenizer": {"name": "raw_bytes"},
        "sequence_length": 16,
    }
    train = {"num_steps": 1, "batch_size": 1}
    return resolve({"model": dataclasses.asdict(config), "data": data, "train": train})


def export(model, folder, **options) -> None:
    exporter = export_hf.make(export_hf.Config(**options), say=lambda text: None)
    exporter.export(model, raw_bytes.make(raw_bytes.Config()), run_of(model.config), folder)


def tokens(vocab_size: int, length: int = 48) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (2, length))


@nnx.jit
def forward(model, batch):
    return model(batch).logits


def our_logits(model, ids, **batch) -> np.ndarray:
    batch = {"tokens": ids, **batch}
    return np.asarray(forward(model, {k: jnp.asarray(x, jnp.int32) for k, x in batch.items()}))


def params_of(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
