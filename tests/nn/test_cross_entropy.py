"""The loss of a head without its logits, beside the loss of logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import assert_trees_close, make_model, random_batch

from llm_jax.core.types import Head
from llm_jax.nn.losses import head_loss, head_nats, logits_loss, token_loss
from llm_jax.nn.precision import Precision
from llm_jax.objectives import causal_lm
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules

B, T, D, V = 8, 24, 16, 40
TIED, UNTIED = "btd,vd->btv", "btd,dv->btv"
ROW = 4 * V  # bytes of one token's logits


def arrays(spec, dtype="float32", length=T):
    rng = np.random.default_rng(0)
    shape = (V, D) if spec == TIED else (D, V)
    weights = rng.integers(0, 3, (B, length)).astype(np.float32)
    assert (weights == 0).any()
    return (
        jnp.asarray(rng.normal(size=(B, length, D)), dtype),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, length)), jnp.int32),
        jnp.asarray(weights),
    )


def chunked(precision, spec, z_loss=0.0, chunk_bytes=None):
    return lambda hidden, w, targets, weights: head_loss(
        precision, hidden, Head(w, spec), targets, weights, z_loss, chunk_bytes=chunk_bytes
    )


def plain(precision, spec, z_loss=0.0):
    return lambda hidden, w, targets, weights: logits_loss(
        precision.einsum(spec, hidden, w, out_dtype=jnp.float32), targets, weights, z_loss
    )


def value_and_gradient(function, *inputs, scale=3.0):
    def scaled(*inputs):
        sums = function(*inputs)
        return scale * sums.loss_sum, sums

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(*inputs)


@pytest.mark.parametrize(
    ("spec", "length", "tokens_per_chunk"),
    [
        (TIED, T, None),
        (UNTIED, T, None),
        (TIED, T, 48),  # four even chunks
        (UNTIED, T, 50),  # the nearest even ones
        (TIED, 23, 17),  # none is even: the last is filled up
        (UNTIED, T, 1),
    ],
)
def test_equals_the_loss_of_logits(spec, length, tokens_per_chunk):
    precision = Precision.on("cpu", "float32")
    inputs = arrays(spec, length=length)
    chunk_bytes = tokens_per_chunk and tokens_per_chunk * ROW
    ours = jax.jit(
        functools.partial(value_and_gradient, chunked(precision, spec, 0.01, chunk_bytes))
    )(*inputs)
    expected = jax.jit(functools.partial(value_and_gradient, plain(precision, spec, 0.01)))(*inputs)
    assert float(ours[0][1].z_loss_sum) > 1
    assert float(ours[0][1].correct_sum) > 0
    for x, y in zip(ours[0][1], expected[0][1], strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6)
    assert_trees_close(ours, expected, rtol=1e-5, atol=2e-5)
    sums = jax.jit(chunked(precision, spec, 0.01, chunk_bytes))(*inputs)
    assert_trees_close(sums, ours[0][1], rtol=1e-6)


@pytest.mark.parametrize("wide_output", [True, False])
def test_bfloat16_is_as_near_to_float32_as_that_of_logits(wide_output):
    half = Precision("bfloat16", wide_output)
    hidden, *rest = arrays(TIED, "bfloat16")
    # A cotangent of 1, as in training: any other rounds the hidden gradient a second time.
    run = lambda function, hidden: jax.jit(  # noqa: E731
        functools.partial(value_and_gradient, function, scale=1.0)
    )(hidden, *rest)
    exact = run(plain(Precision(), TIED), hidden.astype(jnp.float32))
    ours = run(chunked(half, TIED, chunk_bytes=48 * ROW), hidden)
    other = run(plain(half, TIED), hidden)
    assert ours[1][0].dtype == jnp.bfloat16
    assert ours[1][1].dtype == jnp.float32
    distance = lambda a, b: float(jnp.linalg.norm((a - b).astype(jnp.float32)))  # noqa: E731
    for x, y, z in zip(ours[1], other[1], exact[1], strict=True):
        assert distance(x, z) < 1.1 * distance(y, z)
        assert distance(x, z) < 0.01 * distance(z, 0)
    assert float(ours[0][1].loss_sum) == pytest.approx(float(other[0][1].loss_sum), rel=1e-5)


def test_padding_gets_no_gradient_and_extreme_logits_no_nan():
    hidden, w, targets, weights = arrays(TIED)
    function = chunked(Precision(), TIED, chunk_bytes=50 * ROW)
    (_, sums), (d_hidden, d_w) = value_and_gradient(function, hidden * 1e4, w, targets, weights)
    assert np.all(np.asarray(d_hidden)[np.asarray(weights) == 0] == 0)
    for x in (*sums, d_hidden, d_w):
        assert np.isfinite(x).all()


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"context": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"expert": 2, "context": 4},
    {"pipeline": 2, "fsdp": 2, "tensor": 2},
]


def rules_of(sizes, rules="default"):
    config = MeshConfig(**{"data": 1, **sizes}, rules=rules)
    return make_rules(config, make_mesh(config, jax.devices()[: math.prod(sizes.values())]))


def compile_on(rules, spec, z_loss=0.0, chunk_bytes=None, dtype="float32"):
    """The value and gradient of arrays(spec), with parameters and batch placed by the rules."""
    precision = Precision.on("cpu", dtype)
    names = ("vocab", "embed") if spec == TIED else ("embed", "vocab")
    inputs = arrays(spec, dtype)
    axes = (("batch", "length", None), names, ("batch", "length"), ("batch", "length"))
    shardings = tuple(rules.sharding(a, x.shape) for a, x in zip(axes, inputs, strict=True))
    function = functools.partial(value_and_gradient, chunked(precision, spec, z_loss, chunk_bytes))
    with use_rules(rules):
        lowered = jax.jit(
            function, in_shardings=shardings, out_shardings=((None, None), shardings[:2])
        ).lower(*inputs)
    return lowered.compile(), tuple(map(jax.device_put, inputs, shardings))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_same(sizes):
    spec = UNTIED if "data" in sizes or "context" in sizes else TIED
    expected = value_and_gradient(chunked(Precision(), spec, 0.01), *arrays(spec))
    compiled, inputs = compile_on(rules_of(sizes), spec, 0.01, chunk_bytes=5 * ROW)
    assert_trees_close(compiled(*inputs), expected, rtol=1e-5, atol=5e-5)


def test_the_loss_alone_on_a_mesh():
    rules, inputs = rules_of({"fsdp": 2, "context": 2, "tensor": 2}), arrays(UNTIED)
    function = chunked(Precision(), UNTIED, 0.01, chunk_bytes=5 * ROW)
    with use_rules(rules):
        sums = jax.jit(function)(*inputs)
    assert_trees_close(sums, function(*inputs), rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "length", "tokens_per_chunk"), [(TIED, T, None), (UNTIED, T, 50), (TIED, 23, 17)]
)
def test_nats_of_each_token_equal_those_of_logits(spec, length, tokens_per_chunk):
    hidden, w, targets, _ = arrays(spec, length=length)
    logits = Precision().einsum(spec, hidden, w, out_dtype=jnp.float32)
    chunk_bytes = tokens_per_chunk and tokens_per_chunk * ROW
    nats = jax.jit(functools.partial(head_nats, Precision(), chunk_bytes=chunk_bytes))
    expected = token_loss(logits, targets).cross_entropy
    np.testing.assert_allclose(nats(hidden, Head(w, spec), targets), expected, atol=2e-5)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "expert": 4}], ids=str
)
def test_nats_of_each_token_on_a_mesh(sizes):
    rules, (hidden, w, targets, _) = rules_of(sizes), arrays(UNTIED)
    logits = Precision().einsum(UNTIED, hidden, w, out_dtype=jnp.float32)
    nats = functools.partial(head_nats, Precision(), chunk_bytes=5 * ROW)
    with use_rules(rules):
        found = jax.jit(nats)(hidden, Head(w, UNTIED), targets)
    np.testing.assert_allclose(found, token_loss(logits, targets).cross_entropy, atol=2e-5)


@pytest.mark.parametrize("rules", ["sequence", "zero1"])
def test_other_rules_give_the_same(rules):
    expected = value_and_gradient(chunked(Precision(), TIED), *arrays(TIED))
    compiled, inputs = compile_on(rules_of({"fsdp": 2, "tensor": 4}, rules), TIED)
    assert_trees_close(compiled(*inputs), expected, rtol=1e-5, atol=5e-5)


def in_loops(text):
    """The computations of a compiled text that are the bodies of loops."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies
    parts = re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY )", text)
    return "\n".join(p for p in parts if re.match(r"%?([\w.\-]+)", p).group(1) in bodies)


@pytest.mark.parametrize(
    ("sizes", "sums"), [({"fsdp": 8}, "reduce-scatter"), ({"data": 8}, "all-reduce")]
)
def test_the_weight_gradient_is_summed_over_devices_once(sizes, sums):
    text = compile_on(rules_of(sizes), TIED, chunk_bytes=5 * ROW)[0].as_text()
    loops = in_loops(text)
    assert "dot" in loops
    collectives = r"all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
    assert not re.search(rf"= .* ({collectives})\(", loops)
    share = D // sizes.get("fsdp", 1)
    assert len(re.findall(rf"= [^=]*f32\[{V},{share}\][^=]* {sums}\(", text)) == 1


def test_no_logits_of_all_tokens_nor_of_all_the_vocabulary():
    rules = rules_of({"fsdp": 2, "tensor": 4})
    local = B // 2 * T
    for chunk_bytes, present in ((local * ROW, True), (T * ROW, False)):
        text = compile_on(rules, TIED, chunk_bytes=chunk_bytes // 4)[0].as_text()
        rows = {math.prod(map(int, n.split(","))) for n in re.findall(r"f32\[([\d,]+)\]", text)}
        assert (local * V // 4 in rows) == present
        assert local * V not in rows
        gathered = re.findall(r"= (\S+) all-gather\(", text)
        assert gathered
        assert all(shape.startswith(f"f32[{V // 4},{D}]") for shape in gathered)


def test_the_objective_makes_no_logits_and_multiplies_with_the_head_three_times():
    batch, model = random_batch(), make_model(compute_dtype="bfloat16")
    objective = causal_lm.make(causal_lm.Config())

    def loss(params):
        merged = nnx.merge(graphdef, params)
        return objective.loss(merged, batch, key=None, train=True).loss.sum

    graphdef, params = nnx.split(model)
    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    products = re.findall(r' dot\(.*op_name="[^"]*?([a-z]+,[a-z]+->[a-z]+)\)?/dot', text)
    with_head = [p for p in products if "v" in p]
    assert sorted(with_head) == ["btd,btv->dv", "btd,dv->btv", "btv,dv->btd"]
