"""Matmuls of int8 and float8 operands."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import assert_trees_close, make_model, random_batch

from llm_jax.core.config import ConfigError
from llm_jax.nn import low_precision
from llm_jax.nn.precision import Precision, with_precision
from llm_jax.objectives import causal_lm
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules

pytest.importorskip("qwix")

DTYPES = {"int8": {"i8"}, "fp8": {"f8_e4m3fn", "f8_e5m2"}}


def operands(x_shape=(4, 16, 32), w_shape=(32, 4, 8)):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)


def projection(matmul_dtype, spec="btd,dnh->btnh"):
    precision = Precision.on("cpu", "float32", matmul_dtype=matmul_dtype)
    return lambda x, w: jnp.sum(jnp.sin(precision.project(spec, x, w)))


def relative(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


@pytest.mark.parametrize(("matmul_dtype", "error"), [("int8", 0.02), ("fp8", 0.08)])
@pytest.mark.parametrize("spec", ["btd,dnh->btnh", "btd,dnh->bnth"])
def test_projects_and_differentiates_nearly_as_einsum(matmul_dtype, error, spec):
    x, w = operands()
    precision = Precision.on("cpu", "float32", matmul_dtype=matmul_dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def products(function, x, w):
        y, pull = jax.vjp(functools.partial(function, spec), x, w)
        return y, *pull(jax.random.normal(jax.random.key(2), y.shape))

    rounded, exact = products(precision.project, x, w), products(jnp.einsum, x, w)
    for ours, reference in zip(rounded, exact, strict=True):
        assert 1e-4 < relative(ours, reference) < error


@pytest.mark.parametrize("matmul_dtype", DTYPES)
def test_all_three_products_are_of_low_precision(matmul_dtype):
    jaxpr = str(jax.make_jaxpr(jax.grad(projection(matmul_dtype), argnums=(0, 1)))(*operands()))
    assert set(re.findall(r":(i8|f8_\w+)\[", jaxpr)) == DTYPES[matmul_dtype]
    operand_types = dict(re.findall(r"\b([a-z]+):(\w+)\[", jaxpr))
    products = re.findall(r"dot_general\[.*?\] (\w+) (\w+)", jaxpr, re.DOTALL)
    assert len(products) == 3
    for product in products:
        assert {operand_types[name] for name in product} <= DTYPES[matmul_dtype]


def test_each_row_has_its_own_scale():
    """A row and a column 1,024 times the others leave the others as exact as they were."""
    x, w = operands((2, 4, 32), (32, 8))
    precision = Precision.on("cpu", "float32", matmul_dtype="int8")
    project = jax.jit(functools.partial(precision.project, "btd,df->btf"))
    plain, large = project(x, w), project(x.at[0, 0].mul(1024), w.at[:, 0].mul(1024))
    np.testing.assert_allclose(large[1:, :, 1:], plain[1:, :, 1:], rtol=1e-6)
    np.testing.assert_allclose(large[0, 0, 0], 1024**2 * plain[0, 0, 0], rtol=1e-6)


def test_survives_vmap_and_remat():
    """As in a pipeline, whose stages are one vmap with a weight each."""
    x, w = operands((3, 2, 8, 16), (3, 16, 4, 8))
    project = jax.checkpoint(projection("int8"))
    stacked = jax.jit(jax.vmap(jax.value_and_grad(project, argnums=(0, 1))))(x, w)
    each = jax.jit(
        lambda x, w: jax.lax.map(lambda xw: jax.value_and_grad(project, (0, 1))(*xw), (x, w))
    )
    assert_trees_close(stacked, each(x, w), atol=1e-5)


def test_zeros_stay_zeros():
    x, w = operands()
    for matmul_dtype in DTYPES:
        gradient = jax.jit(jax.grad(projection(matmul_dtype), argnums=(0, 1)))(x * 0, w)
        assert all(np.isfinite(g).all() for g in gradient)
        assert not gradient[1].any()


def test_none_is_einsum():
    inputs = operands()
    assert_trees_close(
        jax.jit(jax.grad(projection(None), argnums=(0, 1)))(*inputs),
        jax.jit(
            jax.grad(
                lambda x, w: jnp.sum(jnp.sin(jnp.einsum("btd,dnh->btnh", x, w))), argnums=(0, 1)
            )
        )(*inputs),
        atol=1e-5,
    )


def test_generation_is_not_rounded():
    precision = Precision.on("tpu", "bfloat16", matmul_dtype="int8")
    assert precision.for_generation() == dataclasses.replace(precision, matmul_dtype=None)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "llm_jax\[lowp\]"'):
        low_precision.require()


def gradient_of(matmul_dtype):
    """A tiny model's parameters and a jitted value_and_grad of its loss on a batch."""
    precision = Precision.on("cpu", "bfloat16", matmul_dtype=matmul_dtype)
    model = make_model(compute_dtype="bfloat16", init_stddev=0.05)
    graphdef, params = nnx.split(with_precision(model, precision))
    objective = causal_lm.make(causal_lm.Config())

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        return objective.loss(model, batch, key=None, train=True).loss.mean

    return jax.tree.map(jnp.copy, params), jax.value_and_grad(loss)


def train(matmul_dtype, steps=30):
    params, gradient = gradient_of(matmul_dtype)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        loss, grads = gradient(params, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for number in range(steps):
        params, state, loss = step(params, state, random_batch(seed=number % 3))
        losses.append(float(loss))
    return np.array(losses)


@pytest.mark.slow
def test_thirty_steps_stay_near_bfloat16():
    base = train(None)
    assert base[-1] < 0.8 * base[0]
    for matmul_dtype, nearness in (("int8", 0.03), ("fp8", 0.06)):
        losses = train(matmul_dtype)
        assert not np.array_equal(losses, base)
        np.testing.assert_allclose(losses[-5:].mean(), base[-5:].mean(), rtol=nearness)


def test_a_mesh_gives_nearly_the_same():
    """Not exactly: each device rounds its share of a weight gradient's operands by itself."""
    params, gradient = gradient_of("int8")
    batch = random_batch()
    loss, grads = jax.jit(gradient)(params, batch)
    config = MeshConfig(data=2, fsdp=2, tensor=2)
    rules = make_rules(config, make_mesh(config))
    with use_rules(rules):
        sharded_loss, sharded_grads = jax.jit(gradient)(params, batch)
    assert float(sharded_loss) == pytest.approx(float(loss), rel=1e-3)
    for x, y in zip(jax.tree.leaves(sharded_grads), jax.tree.leaves(grads), strict=True):
        assert relative(x, y) < 0.05
