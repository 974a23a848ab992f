"""The encoder-decoder: who sees whom, the cache, meshes, the start of training."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import padded_tokens, random_model
from tiny import assert_trees_close, params_of, run

from llm_jax.models.encoder_decoder import Config, make
from llm_jax.nn.precision import Precision
from llm_jax.nn.transformer import unstack
from llm_jax.sharding.mesh import make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import use_rules
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program
from llm_jax.training.step import gradients

VOCAB = 64
SIZES = {"vocab_size": VOCAB, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
T5 = {
    "head_dim": 12, "position": "relative", "relative_buckets": 8, "relative_distance": 12,
    "norm": "rmsnorm", "norm_bias": False, "norm_placement": "pre", "attention_bias": False,
    "mlp_bias": False, "attention_scale": 1.0, "scale_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "transformer": {"head_bias": True},
    "t5": {**T5, "scale_outputs": True, "num_decoder_layers": 3},
}
V1_1 = {"scale_outputs": False, "gated": True, "activation": "gelu_tanh", "tie_embeddings": False}
S, T = 16, 12


def config_of(family: str, **changes) -> Config:
    return Config(**{**SIZES, **FAMILIES[family], **changes})


@functools.cache
def model_of(family: str, compute_dtype: str = "float32"):
    return random_model(config_of(family), stddev=0.2, compute_dtype=compute_dtype)


def batch_of(encoder_lengths=(S, 9, 1), lengths=(T, 4, 7), *, left=False, seed=1) -> dict:
    encoder_tokens, encoder_segment_ids = padded_tokens(encoder_lengths, S, seed=seed)
    tokens, segment_ids = padded_tokens(lengths, T, seed=seed + 1, left=left)
    positions = np.maximum(np.cumsum(segment_ids, 1, dtype=np.int32) - 1, 0)
    return {
        "encoder_tokens": encoder_tokens % VOCAB,
        "encoder_segment_ids": encoder_segment_ids,
        "tokens": tokens % VOCAB,
        "segment_ids": segment_ids,
        "positions": positions,
    }


@nnx.jit
def forward(model, batch):
    return model(batch).logits


def logits_of(model, batch) -> np.ndarray:
    return np.asarray(forward(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_who_sees_whom(family):
    """Which tokens have any influence, by the gradient of the embeddings of each place."""
    model, batch = model_of(family), batch_of((9,), (7,))
    graphdef, state = nnx.split(model)
    # Every place has an embedding of its own.
    tokens, encoder_tokens = S + np.arange(T)[None], np.arange(S)[None]
    batch |= {"encoder_tokens": encoder_tokens, "tokens": tokens}

    @jax.jit
    def influence(state):
        def value(state, place):
            hidden = nnx.merge(graphdef, state)(batch).hidden[0, place]
            return jnp.sum(hidden * jnp.arange(1, len(hidden) + 1))

        grads = jax.vmap(jax.grad(value), (None, 0))(state, jnp.arange(T))
        return jnp.any(grads["embed"][...] != 0, -1)  # [T, V]

    seen = np.asarray(influence(state))[:, : S + T]
    of_encoder, of_decoder = seen[:7, :S], seen[:7, S:]
    assert of_encoder[:, :9].all()
    assert not of_encoder[:, 9:].any()
    np.testing.assert_array_equal(of_decoder, np.tri(7, T, dtype=bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_not_matter_on_which_side_the_padding_is(family):
    right, left = batch_of(), batch_of(left=True)
    for row, size in enumerate((T, 4, 7)):
        left["tokens"][row, T - size :] = right["tokens"][row, :size]
    found, wanted = logits_of(model_of(family), left), logits_of(model_of(family), right)
    for row, size in enumerate((T, 4, 7)):
        np.testing.assert_allclose(found[row, T - size :], wanted[row, :size], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_equal_separate_rows(family):
    """Encoder and decoder rows hold the same examples, of other lengths each."""
    model, rows = model_of(family), batch_of((5, 6, 3), (4, 2, 5))
    apart = logits_of(model, rows)

    def joined(prefix, sizes, width):
        out = {}
        for key in ("tokens", "segment_ids", "positions"):
            parts = {
                "tokens": lambda row, size: rows[f"{prefix}tokens"][row, :size],
                "segment_ids": lambda row, size: np.full(size, row + 1),
                "positions": lambda row, size: np.arange(size),
            }[key]
            row = np.concatenate([parts(row, size) for row, size in enumerate(sizes)])
            out[prefix + key] = np.pad(row, (0, width - len(row)))[None].astype(np.int32)
        return out

    packed = joined("encoder_", (5, 6, 3), S) | joined("", (4, 2, 5), T)
    together = logits_of(model, {key: np.repeat(row, 3, axis=0) for key, row in packed.items()})[0]
    for row, (start, size) in enumerate([(0, 4), (4, 2), (6, 5)]):
        np.testing.assert_allclose(together[start : start + size], apart[row, :size], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_cached_decode_equals_the_full_pass(family, left):
    """A prompt of several tokens at once, then one by one."""
    model, batch = model_of(family), batch_of(left=left)
    whole = logits_of(model, batch)
    real = batch["segment_ids"] > 0
    graphdef, state = nnx.split(unstack(model) if left else model)

    @jax.jit
    def begin(state, batch):
        model = nnx.merge(graphdef, state)
        return model.start(model.encode(batch), T + 2)

    @jax.jit
    def step(state, part, cache):
        out = nnx.merge(graphdef, state)(part, cache=cache)
        return out.logits, out.cache

    cache, found = begin(state, batch), []
    for start, stop in [(0, 4), *((i, i + 1) for i in range(4, T))]:
        part = {k: batch[k][:, start:stop] for k in ("tokens", "segment_ids", "positions")}
        logits, cache = step(state, part, cache)
        found.append(logits)
    np.testing.assert_allclose(
        np.concatenate(found, 1) * real[..., None], whole * real[..., None], atol=2e-5
    )


def test_what_is_captured():
    out = run(
        model_of("t5"), batch_of(), capture=("encoder.residual", "decoder.cross_attention")
    )  # fmt: skip
    assert out.captured.keys() == {"encoder.residual", "decoder.cross_attention"}
    assert out.captured["encoder.residual"].shape == (2, 3, S, 32)
    weights = out.captured["decoder.cross_attention"]
    assert weights.shape == (3, 3, 4, 1, T, S)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family):
    batch = batch_of()
    real = (batch["segment_ids"] > 0)[..., None]
    exact = logits_of(model_of(family), batch) * real
    rounded = logits_of(model_of(family, "bfloat16"), batch) * real
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_near_the_uniform_guess(family):
    config = config_of(family, vocab_size=512, embed_dim=128, mlp_dim=256)
    model = nnx.jit(lambda: make(config, precision=Precision(), rngs=nnx.Rngs(0)))()
    batch = batch_of()
    logits = logits_of(model, batch)
    targets = np.random.default_rng(0).integers(0, 512, logits.shape[:2])
    losses = -jax.nn.log_softmax(logits)[*np.indices(targets.shape), targets]
    assert float(losses.mean()) == pytest.approx(math.log(512), abs=0.15)
    # The scores have the scale of others, though T5 does not scale them.
    query = model.encoder.layers.attention.query[...]
    expected = 0.02 * (1.0 if config.attention_scale is None else config.head_dim**-0.5)
    assert float(jnp.std(query)) == pytest.approx(expected, rel=0.05)


def test_dropout_acts_in_training_alone():
    model, batch = random_model(config_of("t5", dropout=0.3), stddev=0.2), batch_of()
    quiet = logits_of(model, batch)
    np.testing.assert_array_equal(quiet, logits_of(model_of("t5"), batch))
    noisy = nnx.jit(lambda model, key: model(batch, train=True, key=key).logits)
    drawn = [np.asarray(noisy(model, jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    assert not np.allclose(drawn[0], quiet)


def loss_and_gradients(mesh: dict):
    """Of one batch in float32, on a mesh of these sizes."""
    run_config = resolve(
        {
            "model": dataclasses.asdict(config_of("t5", **V1_1)),
            "objective": {"name": "seq2seq", "target_length": T},
            "data": {"sequence_length": S, "tokenizer": {"name": "tiktoken"}},
            "train": {"num_steps": 1, "batch_size": 8, "compute_dtype": "float32"},
            "mesh": {"data": 1, **mesh},
        }
    )
    devices = jax.devices()[: math.prod(mesh.values())]
    program = build_program(run_config, make_mesh(run_config.mesh, devices))
    batch = batch_of((S, 9, 1, 3, 14, 2, 8, 5), (T, 4, 7, 2, 9, 1, 11, 3))
    batch["encoder_positions"] = np.broadcast_to(np.arange(S, dtype=np.int32), (8, S))
    batch |= {"targets": (batch["tokens"] + 1) % VOCAB}
    batch["loss_weights"] = batch["segment_ids"].astype(np.float32)
    batch = to_global_batch(batch, program.rules, 8)

    @jax.jit
    def compute(params, batch):
        with use_rules(program.rules):
            grads, loss, _ = gradients(
                params, {}, batch, jax.random.key(1), graphdef=program.graphdef,
                objective=program.objective, accumulate_steps=1,
            )  # fmt: skip
        return grads, loss.mean

    params = params_of(random_model(run_config.model, stddev=0.2))
    params = jax.device_put(params, program.state_shardings.params)
    return jax.device_get(compute(params, batch))


@pytest.mark.slow
def test_shares_give_the_same_loss_and_gradients():
    """What the Transformer of 2017 has else, biases and tied embeddings, tests/models/test_bert.py has."""
    grads, loss = loss_and_gradients({"data": 2, "fsdp": 2, "tensor": 2})
    expected, expected_loss = loss_and_gradients({})
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_trees_close(grads, expected, atol=2e-4)


def test_shares_of_the_sequence_are_refused_in_one_line():
    with pytest.raises(ValueError, match="whole sequences: use a mesh with context=1") as error:
        loss_and_gradients({"context": 2})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_layers": 0}, "num_decoder_layers 0 must be positive"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"norm": "rmsnorm"}, "norm bias=True needs kind='layernorm'"),
        ({"position": "relative", "relative_buckets": 6}, "num_buckets 6"),
        ({"embed_dim": 33, "num_heads": 3}, "embed_dim 33 must be even"),
        ({"relative_buckets": 16}, "relative_buckets 16 has no effect without position='relative'"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**{**SIZES, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", ["encoder_tokens", "tokens"])
def test_too_long_a_row_is_refused(side):
    model = random_model(config_of("transformer", max_length=12))
    batch = {"encoder_tokens": np.zeros((1, 4), np.int32), "tokens": np.zeros((1, 4), np.int32)}
    with pytest.raises(ValueError, match=f"{side}: length 13 exceeds the model's max_length 12"):
        model({**batch, side: np.zeros((1, 13), np.int32)})


def test_parameters_of_a_stack_have_names_of_their_own():
    paths = {
        ".".join(map(str, path))
        for path, _ in nnx.to_flat_state(nnx.state(model_of("t5"), nnx.Param))
    }
    assert {
        "embed",
        "encoder.relative_bias.table",
        "decoder.layers.cross_attention.query",
        "decoder.layers.cross_norm.scale",
        "encoder_norm.scale",
    } <= paths
    assert not params_of(model_of("t5")).keys() & {"head", "head_bias"}
