"""Tiny models with random weights, large enough to have opinions."""

from flax import nnx

from llm_jax.models.gpt import GPT, Config, make
from llm_jax.nn.precision import Precision

VARIANTS = {
    "rotary": {},
    "learned": {"position": "learned", "norm": "layernorm", "norm_bias": True, "gated": False},
    "grouped": {"num_kv_heads": 2},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 1},
}


def tiny_model(*, precision: Precision | None = None, **changes) -> GPT:
    """GPT over the 259 ids of raw_bytes. Large initial weights make its predictions sharp."""
    fields = {
        "vocab_size": 259, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_length": 64,
        "init_stddev": 0.3,
    }  # fmt: skip
    config = Config(**(fields | changes))
    return make(config, precision=precision or Precision(), rngs=nnx.Rngs(0))
