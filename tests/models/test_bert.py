"""The bidirectional encoder and its heads: who sees whom, places to predict, meshes, the start."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import padded_tokens, random_model
from tiny import assert_trees_close, params_of

from llm_jax.models.bert import Config, make
from llm_jax.models.bert.model import mean_pooled
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import use_rules
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program
from llm_jax.training.step import gradients

VOCAB, T = 64, 16
SIZES = {
    "vocab_size": VOCAB, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48,
    "num_positions": 20,
}  # fmt: skip
ROBERTA = {"position_offset": 2, "num_token_types": 1}


def config_of(head: str = "none", **changes) -> Config:
    labels = {"num_labels": 3} if head.endswith("classification") else {}
    return Config(**{**SIZES, "head": head, **labels, **changes})


@functools.cache
def model_of(head: str = "none", compute_dtype: str = "float32"):
    return random_model(config_of(head), stddev=0.2, compute_dtype=compute_dtype)


def batch_of(lengths=(T, 9, 1), seed=1) -> dict:
    tokens, segment_ids = padded_tokens(lengths, T, seed=seed)
    return {"tokens": tokens % VOCAB, "segment_ids": segment_ids}


@nnx.jit
def forward(model, batch):
    return model(batch)


def test_who_sees_whom():
    """Which tokens have any influence, by the gradient of the embeddings of each place."""
    graphdef, state = nnx.split(model_of())
    batch = {**batch_of((9,)), "tokens": np.arange(T)[None]}  # each place has its own embedding

    @jax.jit
    def influence(state):
        def value(state, place):
            hidden = nnx.merge(graphdef, state)(batch).hidden[0, place]
            return jnp.sum(hidden * jnp.arange(1, len(hidden) + 1))

        grads = jax.vmap(jax.grad(value), (None, 0))(state, jnp.arange(9))
        return jnp.any(grads["embed"][...] != 0, -1)  # [T, V]

    seen = np.asarray(influence(state))
    assert seen[:, :9].all()
    assert not seen[:, 9:].any()


def test_packed_texts_equal_separate_rows():
    model, rows, sizes = model_of(), batch_of((5, 8, 3)), (5, 8, 3)
    rows["token_types"] = np.random.default_rng(0).integers(0, 2, (3, T)).astype(np.int32)
    apart = forward(model, rows).hidden
    join = lambda parts: np.concatenate(parts)[None].astype(np.int32)  # noqa: E731
    packed = {
        "tokens": join([rows["tokens"][i, :n] for i, n in enumerate(sizes)]),
        "token_types": join([rows["token_types"][i, :n] for i, n in enumerate(sizes)]),
        "segment_ids": join([np.full(n, i + 1) for i, n in enumerate(sizes)]),
        "positions": join([np.arange(n) for n in sizes]),
    }
    together = forward(model, packed).hidden[0]
    for row, (start, size) in enumerate(zip((0, 5, 13), sizes, strict=True)):
        np.testing.assert_allclose(together[start : start + size], apart[row, :size], atol=2e-5)


@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_predicted_places_are_those_of_the_whole_row(head):
    model, batch = model_of(head), batch_of()
    whole = forward(model, batch)
    places = np.array([[3, 0, 15], [8, 8, 1], [0, 0, 0]], np.int32)
    some = forward(model, batch | {"predict_positions": places})
    assert some.hidden.shape == (3, 3, 32)
    wanted = np.take_along_axis(np.asarray(whole.logits), places[..., None], axis=1)
    np.testing.assert_allclose(some.logits, wanted, atol=1e-5)
    if head == "pretraining":
        assert whole.class_logits.shape == (3, 2)
        np.testing.assert_allclose(some.class_logits, whole.class_logits, atol=1e-5)
    else:
        assert whole.class_logits is None


@pytest.mark.parametrize(
    ("head", "logits", "classes"),
    [
        ("none", None, None),
        ("sequence_classification", None, (3, 3)),
        ("token_classification", (3, T, 3), None),
        ("question_answering", (3, T, 2), None),
    ],
)
def test_shapes_of_the_other_heads(head, logits, classes):
    model = model_of(head)
    out = jax.eval_shape(lambda: model(batch_of()))
    assert out.hidden.shape == (3, T, 32)
    assert (out.logits and out.logits.shape) == logits
    assert (out.class_logits and out.class_logits.shape) == classes


def test_tokens_are_of_the_first_type_unless_told():
    model, batch = model_of(), batch_of()
    plain = forward(model, batch).hidden
    types = np.zeros((3, T), np.int32)
    np.testing.assert_array_equal(forward(model, batch | {"token_types": types}).hidden, plain)
    types[0, 3:] = 1
    typed = forward(model, batch | {"token_types": types}).hidden
    assert not np.allclose(typed[0], plain[0])
    np.testing.assert_array_equal(typed[1:], plain[1:])
    # RoBERTa has one type and its texts are pairs all the same.
    roberta = random_model(config_of(**ROBERTA))
    np.testing.assert_array_equal(
        forward(roberta, batch).hidden, forward(roberta, batch | {"token_types": types}).hidden
    )


@pytest.mark.parametrize("head", ["pretraining", "sequence_classification"])
def test_bfloat16_is_close(head):
    exact, rounded = (forward(model_of(head, t), batch_of()) for t in ("float32", "bfloat16"))
    for name in ("logits", "class_logits", "hidden"):
        x, y = getattr(exact, name), getattr(rounded, name)
        if x is not None:
            real = batch_of()["segment_ids"][..., None] if x.ndim == 3 else 1
            assert np.abs((x - y) * real).max() < 0.05 * np.abs(x * real).max(), name


def test_training_starts_near_the_uniform_guess():
    config = config_of("pretraining", vocab_size=512, embed_dim=128)
    model = nnx.jit(lambda: make(config, precision=Precision(), rngs=nnx.Rngs(0)))()
    out = forward(model, batch_of())
    targets = np.random.default_rng(0).integers(0, 512, (3, T))
    losses = -jax.nn.log_softmax(out.logits)[*np.indices(targets.shape), targets]
    assert float(losses.mean()) == pytest.approx(math.log(512), abs=0.1)
    assert np.abs(out.class_logits).max() < 0.5


def test_dropout_acts_in_training_alone():
    model = random_model(config_of("sequence_classification", dropout=0.3), stddev=0.2)
    batch = batch_of()
    quiet = forward(model, batch).class_logits
    noisy = nnx.jit(lambda model, key: model(batch, train=True, key=key).class_logits)
    drawn = [np.asarray(noisy(model, jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(
        quiet, forward(model_of("sequence_classification"), batch).class_logits
    )
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    assert not np.allclose(drawn[0], quiet)


def loss_and_gradients(sizes: dict):
    """Of one batch of masked pairs in float32, on a mesh of these sizes."""
    run_config = resolve(
        {
            "model": dataclasses.asdict(config_of("pretraining")),
            "objective": {"name": "masked_lm", "pairs": "next_sentence"},
            "data": {"sequence_length": T, "tokenizer": {"name": "tiktoken"}},
            "train": {"num_steps": 1, "batch_size": 8, "compute_dtype": "float32"},
            "mesh": {"data": 1, **sizes},
        }
    )
    devices = jax.devices()[: math.prod(sizes.values())]
    program = build_program(run_config, make_mesh(run_config.mesh, devices))
    rng, spec = np.random.default_rng(0), program.batch_spec
    batch = batch_of((T, 9, 4, 16, 7, 12, 3, 16))
    batch["positions"] = np.maximum(np.cumsum(batch["segment_ids"], 1, dtype=np.int32) - 1, 0)
    batch["predict_positions"] = rng.integers(0, 3, spec["predict_positions"].shape)
    batch["targets"] = rng.integers(0, VOCAB, spec["targets"].shape)
    batch["token_types"] = rng.integers(0, 2, (8, T))
    batch["labels"] = rng.integers(0, 2, 8)
    batch |= {name: np.ones(spec[name].shape) for name in ("loss_weights", "label_weights")}
    assert batch.keys() == spec.keys()
    batch = {name: np.asarray(x, spec[name].dtype) for name, x in batch.items()}
    batch = to_global_batch(batch, program.rules, 8)

    @jax.jit
    def compute(params, batch):
        with use_rules(program.rules):
            grads, loss, metrics = gradients(
                params, {}, batch, jax.random.key(1), graphdef=program.graphdef,
                objective=program.objective, accumulate_steps=1,
            )  # fmt: skip
        return grads, {"loss": loss.mean, **{k: v.mean for k, v in metrics.items()}}

    params = params_of(random_model(run_config.model, stddev=0.2))
    params = jax.device_put(params, program.state_shardings.params)
    return jax.device_get(compute(params, batch))


def test_shares_give_the_same_loss_and_gradients():
    expected, expected_metrics = loss_and_gradients({})
    grads, metrics = loss_and_gradients({"data": 2, "fsdp": 2, "tensor": 2})
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    assert_trees_close(grads, expected, atol=2e-4)


def test_shares_of_the_sequence_are_refused_in_one_line():
    with pytest.raises(ValueError, match="whole sequences: use a mesh with context=1") as error:
        loss_and_gradients({"context": 2})
    assert "\n" not in str(error.value)


def test_embeddings_of_sentences():
    hidden = jnp.array([[[3.0, 0.0], [1.0, 4.0], [99.0, 99.0]], [[7.0, 7.0]] * 3])
    found = mean_pooled(hidden, np.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_allclose(found[0], [2**-0.5, 2**-0.5], atol=1e-6)
    np.testing.assert_array_equal(found[1], 0)  # a row of padding, not NaN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"position_offset": 20}, r"position_offset 20 must lie in \[0, num_positions 20\)"),
        ({"num_labels": 3}, "num_labels 3 with head 'none'"),
        ({"head": "token_classification"}, "num_labels None with head 'token_classification'"),
        ({"head": "pretraining", "pooler": False}, "pooler False: the head 'pretraining'"),
        ({"num_token_types": 0}, "num_token_types 0 must be positive"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Config(**{**SIZES, "head": "none", **changes})
    assert "\n" not in str(error.value)


def test_the_pooler_is_there_where_it_is_needed_or_comes_with_the_checkpoint():
    found = {head: config_of(head).pooler for head in ("none", "masked_lm", "pretraining")}
    assert found == {"none": True, "masked_lm": False, "pretraining": True}


def test_positions_behind_an_offset():
    """RoBERTa: the first rows of the table are not used, and the length is what they leave."""
    config = config_of(**ROBERTA)
    assert config.max_length == 18
    model = random_model(config)
    with pytest.raises(ValueError, match="sequence length 19 exceeds the model's max_length 18"):
        model({"tokens": np.zeros((1, 19), np.int32)})
    moved = random_model(config_of(num_positions=18, num_token_types=1))
    moved.position_embed[...] = model.position_embed[2:]
    for name in ("embed", "type_embed", "embed_norm", "stack"):
        setattr(moved, name, getattr(model, name))
    batch = batch_of()
    np.testing.assert_array_equal(forward(moved, batch).hidden, forward(model, batch).hidden)
