"""Hand-written gradients and formulas against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.nn.losses import token_loss
from llm_jax.nn.mask import Places, attention_mask
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.relative import RelativeBias, RelativeBiasConfig
from llm_jax.nn.rope import RopeConfig, RopeScaling, apply_rope, rope_frequencies, rope_tables


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape"),
    [
        ("btd,dnh->btnh", (2, 3, 4), (4, 5, 6)),
        ("btnh,nhd->btd", (2, 3, 5, 6), (5, 6, 4)),
        ("btkgh,bskh->bkgts", (2, 3, 2, 3, 4), (2, 5, 2, 4)),
        ("btd,vd->btv", (2, 3, 4), (7, 4)),
    ],
)
def test_einsum_gradients(spec, x_shape, w_shape, wide):
    x = jax.random.normal(jax.random.key(0), x_shape)
    w = jax.random.normal(jax.random.key(1), w_shape)
    plain = lambda x, w: jnp.sum(jnp.sin(jnp.einsum(spec, x, w)))  # noqa: E731
    expected = jax.grad(plain, (0, 1))(x, w)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        precision = Precision(dtype, wide)
        ours = lambda x, w, p=precision: jnp.sum(jnp.sin(p.einsum(spec, x, w).astype(jnp.float32)))  # noqa: E731
        grads = jax.jit(jax.grad(ours, (0, 1)))(x, w)
        for g, e in zip(grads, expected, strict=True):
            assert g.dtype == jnp.float32
            assert jnp.linalg.norm(g - e) < tolerance * jnp.linalg.norm(e)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_norm_gradients(kind, shape, on_cpu):
    bias = kind == "layernorm" and len(shape) == 3
    config = NormConfig(kind, 1e-5, bias)
    norm = Norm(8, config, precision=Precision("float32", on_cpu), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(norm)
    state = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(5), a.shape), state)
    x = jax.random.normal(jax.random.key(1), shape) + 2.0

    def reference(state, x):
        if kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * state["scale"][...]
        return y + state["bias"][...] if bias else y

    value = lambda f: lambda s, x: jnp.sum(jnp.sin(f(s, x)))  # noqa: E731
    ours = lambda s, x: nnx.merge(graphdef, s)(x)  # noqa: E731
    close(ours(state, x), reference(state, x))
    close(
        jax.grad(value(ours), (0, 1))(state, x), jax.grad(value(reference), (0, 1))(state, x), 1e-4
    )


def test_token_loss_and_its_gradient():
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 5, 11))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)

    def reference(logits):
        log_z = jax.nn.logsumexp(logits, -1)
        at = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum((log_z - at) * jnp.arange(5.0)) + 0.1 * jnp.sum(log_z**2)

    def ours(logits):
        loss = token_loss(logits, targets)
        return jnp.sum(loss.cross_entropy * jnp.arange(5.0)) + 0.1 * jnp.sum(loss.log_z**2)

    close(ours(logits), reference(logits))
    close(jax.grad(ours)(logits), jax.grad(reference)(logits))
    correct = token_loss(logits, targets).correct
    np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)


def test_rope_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    rotate = lambda x, p: apply_rope(x, rope_tables(RopeConfig(), 16, jnp.array([[p]])))  # noqa: E731
    score = lambda a, b: float(jnp.sum(rotate(q, a) * rotate(k, b)))  # noqa: E731
    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(6, 2)) > 1e-3


def test_llama3_scaling_slows_only_slow_frequencies():
    plain = rope_frequencies(RopeConfig(500_000.0), 128)
    scaled = rope_frequencies(RopeConfig(500_000.0, RopeScaling()), 128)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    slow = wavelength > 8192
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (4, 2)])
def test_relative_biases_of_few_tokens(queries, keys):
    bias = RelativeBias(2, RelativeBiasConfig(8, 9), causal=False, stddev=1.0, rngs=nnx.Rngs(0))
    expected = bias.after(jnp.zeros((), jnp.int32), queries, keys)
    np.testing.assert_array_equal(bias(queries, keys), expected)


def test_a_window_bounds_a_prefix_on_both_sides():
    places = Places(jnp.ones((1, 6), jnp.int32), jnp.arange(6)[None])
    prefix = jnp.array([[1, 1, 1, 1, 0, 0]])
    mask = attention_mask(places, places, causal=True, window=2, prefix=prefix)[0]
    expected = [
        [abs(q - k) < 2 and (k <= q or k < 4) for k in range(6)] for q in range(6)
    ]  # fmt: skip
    np.testing.assert_array_equal(mask, expected)
