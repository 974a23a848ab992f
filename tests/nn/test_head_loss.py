"""What a head may have, bias and soft cap, and smoothed labels: against plain definitions."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close

from llm_jax.core.types import Head
from llm_jax.nn.losses import head_loss, head_nats, logits_loss, token_loss
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules

B, T, D, V = 8, 24, 16, 40
TIED, UNTIED = "btd,vd->btv", "btd,dv->btv"
ROW = 4 * V  # bytes of one token's logits
Z_LOSS, SMOOTHING, CAP = 0.01, 0.1, 5.0
# (has a bias, soft cap, label smoothing)
EVERYTHING = (True, CAP, SMOOTHING)
FORMS = [(True, None, 0.0), (False, CAP, 0.0), (False, None, SMOOTHING), EVERYTHING]


def arrays(spec, form, length=T):
    """hidden, head, targets, weights."""
    rng = np.random.default_rng(0)
    shape = (V, D) if spec == TIED else (D, V)
    has_bias, soft_cap, _ = form
    weights = rng.integers(0, 3, (B, length)).astype(np.float32)
    hidden = jnp.asarray(rng.normal(size=(B, length, D)), jnp.float32)
    head_weights = jnp.asarray(rng.normal(size=shape), jnp.float32)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if has_bias else None
    targets = jnp.asarray(rng.integers(0, V, (B, length)), jnp.int32)
    return hidden, Head(head_weights, spec, bias, soft_cap), targets, jnp.asarray(weights)


def logits_of(hidden, head):
    logits = jnp.einsum(head.spec, hidden, head.weights, precision="highest")
    logits = logits if head.bias is None else logits + head.bias
    return logits if head.soft_cap is None else head.soft_cap * jnp.tanh(logits / head.soft_cap)


def plain_loss(smoothing, hidden, head, targets, weights):
    """The cross entropy of one-hot targets mixed with 1 / V everywhere."""
    logits = logits_of(hidden, head)
    wanted = (1 - smoothing) * jax.nn.one_hot(targets, V) + smoothing / V
    loss = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum((loss + Z_LOSS * log_z**2) * weights)


def in_numpy(smoothing, hidden, head, targets, weights):
    """The four sums of a HeadLoss, in float64."""
    hidden, w, weights = (np.asarray(x, np.float64) for x in (hidden, head.weights, weights))
    logits = np.einsum(head.spec, hidden, w)
    if head.bias is not None:
        logits = logits + np.asarray(head.bias, np.float64)
    if head.soft_cap is not None:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z[..., None] - logits
    of_target = np.take_along_axis(nats, np.asarray(targets)[..., None], axis=-1)[..., 0]
    z = Z_LOSS * (log_z**2 * weights).sum()
    loss = (((1 - smoothing) * of_target + smoothing * nats.mean(-1)) * weights).sum() + z
    correct = ((logits.argmax(-1) == np.asarray(targets)) * weights).sum()
    return loss, (of_target * weights).sum(), z, correct


def ours(smoothing, chunk_bytes=None, precision=None):
    """(loss, sums) and the gradients by hidden and head."""
    precision = precision or Precision()

    def loss(hidden, head, targets, weights):
        sums = head_loss(
            precision, hidden, head, targets, weights, Z_LOSS, smoothing, chunk_bytes=chunk_bytes
        )
        return sums.loss_sum, sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def plain_gradient(smoothing, inputs):
    loss = functools.partial(plain_loss, smoothing)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("spec", "length", "tokens_per_chunk"),
    [
        (TIED, T, None),
        (UNTIED, T, 48),  # four even chunks
        (TIED, 23, 17),  # none is even: the last is filled up
    ],
)
def test_equals_the_plain_definition(form, spec, length, tokens_per_chunk):
    inputs, smoothing = arrays(spec, form, length), form[2]
    chunk_bytes = tokens_per_chunk and tokens_per_chunk * ROW
    (_, sums), gradients = jax.jit(ours(smoothing, chunk_bytes))(*inputs)
    expected = in_numpy(smoothing, *inputs)
    np.testing.assert_allclose(sums, expected, rtol=2e-6)
    assert (expected[0] == pytest.approx(expected[1] + expected[2])) == (smoothing == 0)
    assert_trees_close(gradients, plain_gradient(smoothing, inputs), rtol=1e-5, atol=1e-5)
    alone = functools.partial(head_loss, Precision(), z_loss=Z_LOSS, label_smoothing=smoothing)
    hidden, head, targets, weights = inputs
    np.testing.assert_allclose(alone(hidden, head, targets, weights), expected, rtol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_loss_of_logits_equals_the_plain_definition(form):
    inputs, smoothing = arrays(TIED, form), form[2]

    def loss(hidden, head, targets, weights):
        sums = logits_loss(logits_of(hidden, head), targets, weights, Z_LOSS, smoothing)
        return sums.loss_sum, sums

    gradient, sums = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*inputs)
    np.testing.assert_allclose(sums, in_numpy(smoothing, *inputs), rtol=2e-6)
    assert_trees_close(gradient, plain_gradient(smoothing, inputs), rtol=1e-5, atol=1e-5)


def rules_of(sizes, rules="default"):
    config = MeshConfig(**{"data": 1, **sizes}, rules=rules)
    return make_rules(config, make_mesh(config, jax.devices()[: math.prod(sizes.values())]))


def compile_on(rules, spec, form, chunk_bytes):
    """`ours` with parameters and batch placed by the rules, and its arguments."""
    names = ("vocab", "embed") if spec == TIED else ("embed", "vocab")
    hidden, head, *rest = arrays(spec, form)
    on_hidden = rules.sharding(("batch", "length", None), hidden.shape)
    bias = None if head.bias is None else rules.sharding(("vocab",), head.bias.shape)
    on_head = Head(rules.sharding(names, head.weights.shape), spec, bias, head.soft_cap)
    on_tokens = rules.sharding(("batch", "length"), (B, T))
    shardings = (on_hidden, on_head, on_tokens, on_tokens)
    with use_rules(rules):
        lowered = jax.jit(
            ours(form[2], chunk_bytes),
            in_shardings=shardings,
            out_shardings=((None, None), shardings[:2]),
        ).lower(hidden, head, *rest)
    return lowered.compile(), jax.tree.map(jax.device_put, (hidden, head, *rest), shardings)


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ({"data": 8}, "default"),
        ({"fsdp": 8}, "default"),
        ({"tensor": 8}, "default"),
        ({"fsdp": 2, "context": 2, "tensor": 2}, "default"),
        ({"fsdp": 2, "tensor": 4}, "sequence"),
        ({"fsdp": 2, "tensor": 4}, "zero1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens_per_chunk", [None, 5])
def test_every_mesh_gives_the_same(sizes, rules, tokens_per_chunk):
    spec = UNTIED if "context" in sizes else TIED
    chunk_bytes = tokens_per_chunk and tokens_per_chunk * ROW
    compiled, placed = compile_on(rules_of(sizes, rules), spec, EVERYTHING, chunk_bytes)
    (_, sums), gradients = compiled(*placed)
    inputs = arrays(spec, EVERYTHING)
    np.testing.assert_allclose(sums, in_numpy(SMOOTHING, *inputs), rtol=1e-5)
    assert_trees_close(gradients, plain_gradient(SMOOTHING, inputs), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_each_form_alone_with_the_vocabulary_in_shares(form):
    compiled, placed = compile_on(rules_of({"fsdp": 2, "tensor": 4}), TIED, form, 5 * ROW)
    inputs = arrays(TIED, form)
    expected = plain_gradient(form[2], inputs)
    assert_trees_close(compiled(*placed)[1], expected, rtol=1e-5, atol=5e-5)


def test_the_bias_gradient_is_summed_over_devices_once_and_no_logits_are_whole():
    rules = rules_of({"fsdp": 2, "tensor": 4})
    text = compile_on(rules, TIED, EVERYTHING, 12 * ROW // 4)[0].as_text()
    assert len(re.findall(rf"= [^=]*f32\[{V // 4}\][^=]* all-reduce\(", text)) == 1
    sizes = {math.prod(map(int, n.split(","))) for n in re.findall(r"f32\[([\d,]+)\]", text)}
    local = B // 2 * T
    assert 12 * V // 4 in sizes
    assert local * V // 4 not in sizes
    assert local * V not in sizes


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
def test_nats_of_each_token(sizes):
    hidden, head, targets, _ = arrays(UNTIED, EVERYTHING)
    nats = jax.jit(functools.partial(head_nats, Precision(), chunk_bytes=17 * ROW))
    with use_rules(sizes and rules_of(sizes)):
        found = nats(hidden, head, targets)
    expected = token_loss(logits_of(hidden, head), targets).cross_entropy
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("wide_output", [True, False])
def test_the_bias_gradient_is_float32_beside_bfloat16_products(wide_output):
    hidden, *rest = arrays(TIED, EVERYTHING)
    run = jax.jit(ours(SMOOTHING, 48 * ROW, Precision("bfloat16", wide_output)))
    (_, sums), (d_hidden, d_head) = run(hidden.astype(jnp.bfloat16), *rest)
    _, expected = plain_gradient(SMOOTHING, (hidden, *rest))
    assert d_hidden.dtype == jnp.bfloat16
    assert d_head.weights.dtype == d_head.bias.dtype == jnp.float32
    for found, exact in zip(jax.tree.leaves(d_head), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(found - exact) < 0.02 * jnp.linalg.norm(exact)
    assert float(sums.loss_sum) == pytest.approx(in_numpy(SMOOTHING, hidden, *rest)[0], rel=2e-3)


def test_positions_without_weight_get_no_gradient_and_extreme_logits_no_nan():
    run = jax.jit(ours(SMOOTHING, 50 * ROW))
    for soft_cap in (None, CAP):
        hidden, head, targets, weights = arrays(TIED, (True, soft_cap, SMOOTHING))
        for x in jax.tree.leaves(run(hidden * 1e4, head, targets, weights)):
            assert np.isfinite(x).all()
    _, (d_hidden, _) = run(hidden, head, targets, weights)
    assert np.all(np.asarray(d_hidden)[np.asarray(weights) == 0] == 0)
    _, (_, d_head) = run(hidden, head, targets, 0 * weights)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(d_head))


def test_label_smoothing_is_that_of_torch():
    torch = pytest.importorskip("torch")
    hidden, head, targets, _ = arrays(TIED, EVERYTHING)
    in_torch = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    leaves = [in_torch(x).requires_grad_() for x in (hidden, head.weights, head.bias)]
    logits = torch.einsum(TIED, leaves[0], leaves[1]) + leaves[2]
    logits = CAP * torch.tanh(logits / CAP)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING, reduction="sum")
    expected = criterion(logits.reshape(-1, V), in_torch(targets).reshape(-1).long())
    expected.backward()

    def loss(hidden, head):
        ones = jnp.ones((B, T))
        return head_loss(
            Precision(), hidden, head, targets, ones, label_smoothing=SMOOTHING
        ).loss_sum

    found, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    assert float(found) == pytest.approx(expected.item(), rel=1e-6)
    assert_trees_close(gradients, [x.grad.numpy() for x in leaves], rtol=1e-5, atol=1e-5)


def test_whole_examples_with_labels():
    """Logits without a length: [B, C]."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 3)).astype(np.float32)
    labels = np.array([0, 2, 1, 1, 0, 2], np.int32)
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING, reduction="sum")
    expected = criterion(torch.tensor(logits[:4]), torch.tensor(labels[:4]).long())
    found = logits_loss(logits, labels, weights, label_smoothing=SMOOTHING)
    assert float(found.loss_sum) == pytest.approx(float(expected), rel=1e-6)
