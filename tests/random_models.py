"""Models with random parameters, on the way to Hugging Face folders and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import component
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import hf as export_hf
from llm_jax.nn.precision import Precision
from llm_jax.training.config import resolve

PAD = raw_bytes.PAD


def random_model(config, *, seed=0, stddev=0.3, compute_dtype="float32"):
    """Biases and scales too are random, so that a wrong or missing one shows; no compilation."""
    make = component("models", config.name).make
    precision = Precision.on("cpu", compute_dtype)
    abstract = nnx.eval_shape(lambda: make(config, precision=precision, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(stddev * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def export(model, folder, **options) -> None:
    exporter = export_hf.make(export_hf.Config(**options), say=lambda text: None)
    exporter.export(model, raw_bytes.make(raw_bytes.Config()), run_of(model.config), folder)


def run_of(config):
    data = {
        "sources": [{"name": "text", "path": "unread.txt"}],
        "tokenizer": {"name": "raw_bytes"},
        "sequence_length": 16,
    }
    train = {"num_steps": 1, "batch_size": 1}
    return resolve({"model": dataclasses.asdict(config), "data": data, "train": train})


def padded_tokens(lengths, width, *, seed=1, left=False):
    """(tokens, segment_ids): [B, width] int32 of bytes, padded on the right or on the left."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (len(lengths), width)).astype(np.int32)
    places = np.arange(width)[::-1] if left else np.arange(width)
    real = places < np.array(lengths)[:, None]
    return np.where(real, tokens, PAD), real.astype(np.int32)


def assert_same_parameters(a, b) -> None:
    """The same names, and the same bits."""
    a, b = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    bits = lambda x: np.asarray(x).view(np.uint32)  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)
