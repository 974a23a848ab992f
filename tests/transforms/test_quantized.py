import jax
import numpy as np
import pytest
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.transforms.quantized import NF4, Quantized

AXES = ("layers", "embed", "heads", "head_dim")


def quantized(kind, shape=(2, 128, 4, 8), axes=AXES, **changes):
    weight = 0.02 * jax.random.normal(jax.random.key(0), shape)
    return np.asarray(weight), Quantized("a.query", weight, axes, kind, stacked=1, **changes)


@pytest.mark.parametrize(("kind", "gap"), [("int8", 1 / 127), ("nf4", np.diff(NF4).max())])
def test_errors_are_within_half_a_level_of_the_blocks_largest(kind, gap):
    weight, stored = quantized(kind)
    error = np.abs(np.asarray(stored.value()) - weight)
    largest = np.abs(weight).reshape(2, 2, 64, 4, 8).max(2, keepdims=True)
    # Scales are rounded to bfloat16.
    assert np.all(error.reshape(2, 2, 64, 4, 8) <= largest * (gap / 2 + 2**-8))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.25), ("nf4", 4.25)])
def test_bits_of_a_weight(kind, bits):
    weight, stored = quantized(kind)
    parts = (stored.codes[...], stored.scales[...])
    assert 8 * sum(x.nbytes for x in parts) / weight.size == bits
    assert stored.codes.axes == AXES
    assert stored.scales.axes == ("layers", None, "heads", "head_dim")


def test_nf4_equals_qwix():
    qwix = pytest.importorskip("qwix._src.core.numerics")
    np.testing.assert_allclose(NF4, qwix.get_nf4_buckets(), atol=1e-7)


def test_weights_of_levels_come_back_exactly():
    weight = np.resize(NF4, (1, 64, 2)) * 0.5
    stored = Quantized(
        "m.up", jax.numpy.asarray(weight), ("layers", "embed", "mlp"), "nf4", stacked=1
    )
    np.testing.assert_array_equal(stored.value(), weight)


def test_one_layer_of_many():
    _, stored = quantized("nf4")
    whole = np.asarray(stored.value())
    graphdef, state = nnx.split(stored)
    second = nnx.merge(graphdef, jax.tree.map(lambda x: x[1], state))
    np.testing.assert_array_equal(second.value(), whole[1])


def test_odd_sizes():
    weight, stored = quantized("int8", (1, 9, 7), ("layers", "embed", "mlp"))
    np.testing.assert_allclose(stored.value(), weight, atol=5e-4)
    with pytest.raises(ConfigError, match=r"a\.query: size 9 must be even .*'nf4'"):
        quantized("nf4", (1, 9, 7), ("layers", "embed", "mlp"))
