"""Tiny models and batches that many tests share."""

import functools

import jax
import numpy as np
from flax import nnx

from llm_jax.core.packing import next_token_batch
from llm_jax.models import gpt
from llm_jax.nn.precision import Precision
from llm_jax.training.config import resolve

GPT2 = {
    "norm": "layernorm", "norm_bias": True, "position": "learned", "gated": False,
    "activation": "gelu_tanh", "attention_bias": True, "attention_out_bias": True,
    "mlp_bias": True, "tie_embeddings": True,
}  # fmt: skip
LLAMA = {"num_kv_heads": 2}
QWEN3 = {"num_kv_heads": 2, "qk_norm": True, "head_dim": 16}
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}


def model_section(**changes) -> dict:
    sizes = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64}
    sizes |= {"mlp_dim": None} if "experts" in changes else {}
    return {"name": "gpt", "max_length": 32, **sizes, **changes}


@functools.lru_cache
def _made(seed, compute_dtype, changes) -> tuple:
    """Under jit: eager initialization compiles a program per parameter."""
    config = gpt.Config(**model_section(**{"init_stddev": 0.2, **dict(changes)}))
    precision = Precision.on("cpu", compute_dtype)
    make = lambda: gpt.make(config, precision=precision, rngs=nnx.Rngs(seed))  # noqa: E731
    graphdef = nnx.split(nnx.eval_shape(make))[0]
    return graphdef, jax.jit(lambda: nnx.split(make())[1])()


def make_model(seed=0, compute_dtype="float32", **changes) -> gpt.GPT:
    """Larger weights than at the start of training, so that every path matters."""
    return nnx.merge(*_made(seed, compute_dtype, tuple(sorted(changes.items()))))


def run(model, batch, **arguments):
    """The model's output, under jit."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, batch: nnx.merge(graphdef, state)(batch, **arguments))(
        state, batch
    )


def run_config(**sections):
    """A RunConfig; sections update the defaults below."""
    config = {
        "model": model_section(),
        "data": {"sequence_length": 32, "tokenizer": {"name": "tiktoken"}},  # its size is its own
        "train": {"num_steps": 20, "batch_size": 8, "compute_dtype": "float32"},
        "schedule": {"learning_rate": 1e-2, "warmup_steps": 2},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    if "experts" in config["model"]:
        config["model"]["mlp_dim"] = None
    return resolve(config)


def random_batch(batch_size=8, length=32, vocab=64, seed=0) -> dict[str, np.ndarray]:
    """Packed rows of several documents, some cut short by padding; bos 1, eos 2."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(3, vocab, (batch_size, length + 1)).astype(np.int32)
    for row in rows:
        row[rng.integers(0, length, 3)] = 1
        row[length - rng.integers(0, length // 3) :] = -1
    return next_token_batch(rows, 1, 2)


def params_of(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_trees_close(a, b, **tolerance):
    paths = jax.tree_util.tree_leaves_with_path(a)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)
