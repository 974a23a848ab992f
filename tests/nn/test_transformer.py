"""Properties of the core that hold for every family of decoder."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAMILIES, make_model, random_batch, run

from llm_jax.models import gpt
from llm_jax.nn.attention import attention_weights, dot_product_attention
from llm_jax.nn.precision import Precision
from llm_jax.nn.remat import RematPolicy
from llm_jax.nn.transformer import unstack

families = pytest.mark.parametrize("family", FAMILIES)
F32 = Precision("float32")


def tokens_of(*documents):
    """One packed row per argument: lists of documents."""
    return {
        "tokens": jnp.array([[t for d in row for t in d] for row in documents]),
        "segment_ids": jnp.array([[i + 1 for i, d in enumerate(r) for _ in d] for r in documents]),
        "positions": jnp.array([[p for d in row for p in range(len(d))] for row in documents]),
    }


@families
def test_logits_depend_on_earlier_tokens_only(family):
    model = make_model(**FAMILIES[family])
    tokens = jnp.arange(3, 13)[None]
    table = model.embed[...]

    def outputs(inputs):  # [T, D] in place of the looked-up embeddings
        # A private vocabulary of T rows makes the embeddings the argument of the gradient.
        probe = nnx.clone(model)
        probe.embed[...] = table.at[tokens[0]].set(inputs)
        # Weighted: after a LayerNorm the plain sum would be constant.
        return probe({"tokens": tokens}).hidden[0] @ jnp.linspace(-1, 1, inputs.shape[1])

    jacobian = jax.jit(jax.jacrev(outputs))(table[tokens[0]])  # [T out, T in, D]
    influence = np.abs(np.asarray(jacobian)).sum(-1)
    assert np.all(np.triu(influence, 1) == 0)
    assert np.all(np.tril(influence) + np.triu(np.ones_like(influence), 1) > 0)


@families
def test_packed_documents_do_not_see_each_other(family):
    model = make_model(**FAMILIES[family])
    first, second = list(range(3, 12)), list(range(20, 27))
    packed = run(model, tokens_of([first, second])).logits[0]
    for document, logits in ((first, packed[:9]), (second, packed[9:])):
        alone = run(model, tokens_of([document])).logits[0]
        np.testing.assert_allclose(logits, alone, atol=2e-5)


@families
def test_padding_changes_nothing(family):
    model = make_model(**FAMILIES[family])
    batch = tokens_of([list(range(3, 15))])
    padded = {
        "tokens": jnp.pad(batch["tokens"], ((0, 0), (0, 6)), constant_values=9),
        "segment_ids": jnp.pad(batch["segment_ids"], ((0, 0), (0, 6))),
        "positions": jnp.pad(batch["positions"], ((0, 0), (0, 6))),
    }
    logits = run(model, padded).logits
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, :12], run(model, batch).logits, atol=2e-5)


@pytest.mark.parametrize("policy", typing.get_args(RematPolicy)[1:])
def test_remat_changes_memory_not_gradients(policy):
    batch = random_batch()

    def gradient(remat):
        model = make_model(remat=remat, **FAMILIES["qwen3"])
        graphdef, params = nnx.split(model)
        loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(batch).logits))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, rematted = map(jax.tree.leaves, (gradient("none"), gradient(policy)))
    for a, b in zip(plain, rematted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_remat_recomputes_where_no_loop_is_left():
    """The compiler must not merge the recomputation with the forward pass."""
    batch = random_batch()

    def flops(**options):
        graphdef, params = nnx.split(make_model(**options))
        loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(batch).logits))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    plain = flops(scan_unroll=2)
    assert flops(scan_unroll=2, remat="full") > 1.1 * plain


def test_unstacked_layers_compute_the_same():
    model, batch = make_model(**FAMILIES["qwen3"]), random_batch()
    np.testing.assert_allclose(
        run(unstack(model), batch).logits, run(model, batch).logits, atol=1e-5
    )


def test_unrolling_the_scan_changes_nothing():
    batch = random_batch()
    one, two = (run(make_model(scan_unroll=n), batch).logits for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_grouped_queries_equal_repeated_keys():
    key = jax.random.key(0)
    q = jax.random.normal(key, (2, 7, 6, 8))
    k, v = jax.random.normal(key, (2, 2, 7, 2, 8))
    mask = jnp.tril(jnp.ones((7, 7), bool))[None]
    repeat = lambda x: jnp.repeat(x, 3, axis=2)  # noqa: E731
    grouped = dot_product_attention(F32, q, k, v, mask)
    full = dot_product_attention(F32, q, repeat(k), repeat(v), mask)
    np.testing.assert_allclose(grouped, full, atol=1e-6)


def test_written_out_attention_gradient_is_the_derivative():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 7, 6, 8))
    k, v = (jax.random.normal(key, (2, 7, 2, 8)) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], q.shape)
    mask = jnp.tril(jnp.ones((7, 7), bool))[None]

    def reference(q, k, v):
        weights = attention_weights(q, k, mask, F32)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
        return jnp.sum(out * cotangent)

    ours = lambda q, k, v: jnp.sum(dot_product_attention(F32, q, k, v, mask) * cotangent)  # noqa: E731
    expected = jax.grad(reference, (0, 1, 2))(q, k, v)
    for a, b in zip(jax.grad(ours, (0, 1, 2))(q, k, v), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dropout_follows_its_key_and_train_only():
    model, batch = make_model(dropout=0.5), random_batch()

    def logits(seed, train=True):
        return run(model, batch, train=train, key=jax.random.key(seed)).logits

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.allclose(logits(0), logits(1))
    np.testing.assert_array_equal(logits(0, train=False), run(model, batch).logits)


def test_captures():
    model, batch = make_model(**FAMILIES["llama"]), random_batch()
    captured = run(model, batch, capture=("attention", "residual")).captured
    assert captured["residual"].shape == (2, 8, 32, 32)
    assert captured["attention"].shape == (2, 8, 2, 2, 32, 32)
    np.testing.assert_allclose(captured["attention"].sum(-1), 1, atol=1e-5)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="length 33 exceeds the model's max_length 32"):
        make_model()({"tokens": jnp.zeros((1, 33), jnp.int32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4, "head_dim": 8}, "6 must be a multiple .* 4"),
        ({"num_heads": 0}, "num_heads 0 must be positive"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"norm_bias": True}, "norm bias=True needs kind='layernorm'"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_bfloat16_stays_near_float32():
    batch = random_batch()
    exact = run(make_model(init_stddev=0.05), batch).logits
    rounded = run(make_model(init_stddev=0.05, compute_dtype="bfloat16"), batch).logits
    assert rounded.dtype == jnp.float32
    error = jnp.abs(rounded - exact).max() / jnp.abs(exact).max()
    assert 1e-6 < error < 0.03


def test_config_round_trip():
    config = gpt.Config(vocab_size=10, embed_dim=32, num_layers=1, num_heads=4)
    assert config.mlp_dim == 128  # 8/3 of 32, rounded up to 64
    assert gpt.Config(**dataclasses.asdict(config)) == config
