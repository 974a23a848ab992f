"""Mixture of experts against a plain loop over experts, on one device and in shares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm_jax.core.param import normal
from llm_jax.nn.kernels.grouped_matmul import (
    _pallas_gradient,
    grouped_gradient,
    grouped_matmul,
)
from llm_jax.nn.mlp import ACTIVATIONS
from llm_jax.nn.moe import Moe, MoeConfig, RouterSums, router_loss, router_metrics
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import logical_axes, shardings_for, use_rules

B, T, D, F, E, K = 8, 8, 16, 24, 8, 2
CONFIG = MoeConfig(num_experts=E, mlp_dim=F, experts_per_token=K)
UNGATED = dataclasses.replace(CONFIG, gated=False)  # compiles faster


def make_moe(config=CONFIG, compute_dtype="float32", wide=True):
    return Moe(
        D, config, init=normal(0.4), out_init=normal(0.4),
        precision=Precision(compute_dtype, wide), rngs=nnx.Rngs(0),
    )  # fmt: skip


@functools.cache
def inputs(dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(1), (B, T, D)).astype(dtype)
    valid = jnp.arange(T) < jnp.array([T, T, 5, T, 1, T, 0, T])[:, None]
    return x, valid


@functools.cache
def pure(config=CONFIG, compute_dtype="float32", wide=True):
    """The layer as a function of a dict of parameters, and these."""
    graphdef, state = nnx.split(make_moe(config, compute_dtype, wide))

    def apply(params, x, valid):
        state_ = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(state_, params)
        return nnx.merge(graphdef, state_)(x, valid)

    return apply, nnx.to_pure_dict(state), logical_axes(state)


def value(apply, config=CONFIG):
    """A scalar that every output and the loss enter, with all sums beside it."""

    def f(params, x, valid):
        y, sums = apply(params, x, valid)
        y = y.astype(jnp.float32) * valid[..., None]
        loss = jnp.sum(jnp.sin(y) * jnp.arange(D)) / D + 10 * router_loss(config, sums)
        return loss, (y, sums)

    return f


def loop(config, params, x, valid):
    """Every expert on every token, weighted: what the layer must equal."""
    logits = jnp.einsum("btd,de->bte", x, params["router"], precision="highest")
    probabilities = jax.nn.softmax(logits)
    kept = jnp.argsort(-logits, -1)[..., : config.experts_per_token]
    weights = jnp.zeros_like(probabilities)
    for j in range(config.experts_per_token):
        mine = jax.nn.one_hot(kept[..., j], config.num_experts)
        weights += mine * probabilities
    counts = jnp.sum((weights > 0) * valid[..., None], (0, 1)).astype(jnp.float32)
    if config.normalize_weights:
        weights = weights / weights.sum(-1, keepdims=True)
    act, y = ACTIVATIONS[config.activation], 0.0
    dot = functools.partial(jnp.dot, precision="highest")
    for e in range(config.num_experts):
        h = dot(x, params["up"][e])
        h = act(dot(x, params["gate"][e])) * h if config.gated else act(h)
        y += weights[..., e : e + 1] * dot(h, params["down"][e])
    if config.shared_dim is not None:
        shared = params["shared"]
        h = act(dot(x, shared["gate"])) * dot(x, shared["up"])
        y += dot(h, shared["down"])
    sums = RouterSums(
        tokens=jnp.sum(valid).astype(jnp.float32),
        counts=counts,
        probabilities=jnp.sum(probabilities * valid[..., None], (0, 1)),
        z=jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * valid),
        dropped=jnp.zeros(()),
    )
    return y, sums


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(initial=1), rtol=tolerance)


def run(apply, params, x, valid, config=CONFIG):
    f = jax.jit(jax.value_and_grad(value(apply, config), (0, 1), has_aux=True))
    return f(params, x, valid)


def shared_run(mesh_config, config=CONFIG, params=None, x=None, wide=True):
    """`run` on a mesh of eight devices, parameters and tokens in shares."""
    apply, own, axes = pure(config, wide=wide)
    params = own if params is None else params
    x_, valid = inputs()
    x = x_ if x is None else x
    rules = make_rules(mesh_config, make_mesh(mesh_config))
    with use_rules(rules):
        params = jax.device_put(params, shardings_for(params, axes, rules))
        x = jax.device_put(x, rules.sharding(("batch", "length", None), x.shape))
        return run(apply, params, x, valid, config)


CONFIGS = {
    "plain": CONFIG,
    "shared, raw weights": dataclasses.replace(CONFIG, shared_dim=12, normalize_weights=False),
    "ungated, dense": dataclasses.replace(
        CONFIG, gated=False, activation="gelu", experts_per_token=E
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_loop_over_experts(name):
    config = CONFIGS[name]
    apply, params, _ = pure(config)
    x, valid = inputs()
    close(
        run(apply, params, x, valid, config),
        run(functools.partial(loop, config), params, x, valid, config),
    )


@functools.cache
def expected_run(config):
    apply, params, _ = pure(config)
    return run(apply, params, *inputs(), config)


@pytest.mark.parametrize(
    ("mesh", "round_factor"),
    [
        ({"expert": 2, "data": 4}, 2.0),
        ({"expert": 4, "fsdp": 2}, 0.5),  # takes two rounds
        ({"expert": 2, "tensor": 2, "context": 2, "rules": "sequence"}, 0.5),
        ({"fsdp": 4, "data": 2, "rules": "zero1"}, 2.0),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(mesh, round_factor):
    config = dataclasses.replace(UNGATED, round_factor=round_factor)
    close(shared_run(MeshConfig(**mesh), config), expected_run(UNGATED))


def to_one_expert(params, x):
    """Parameters and tokens with which every token chooses experts 6 and 7."""
    x = x.at[..., 0].set(3.0)
    router = 0.01 * params["router"]
    return params | {"router": router.at[0, 6:].add(jnp.array([20.0, 21.0]))}, x


def test_dropless_when_all_tokens_choose_one_shard():
    config = dataclasses.replace(CONFIG, round_factor=1.0)
    _, params, _ = pure(config)
    x, valid = inputs()
    params, x = to_one_expert(params, x)
    expected = run(functools.partial(loop, config), params, x, valid, config)
    assert expected[0][1][1].counts.tolist() == [0] * 6 + [float(valid.sum())] * 2
    close(shared_run(MeshConfig(expert=4, data=2), config, params, x), expected)


def test_capacity_drops_second_choices_and_late_tokens_and_counts_them():
    config = dataclasses.replace(CONFIG, capacity_factor=1.0)
    apply, params, _ = pure(config)
    x, valid = inputs()
    x = jnp.tile(x[:1], (8, 4, 1))  # [8, 32, D]: 32 tokens on each device
    params, x = to_one_expert(params, x)
    mesh = MeshConfig(expert=4, data=2)
    rules = make_rules(mesh, make_mesh(mesh))
    valid = jnp.ones(x.shape[:2], bool).at[0, 20:].set(False)
    with use_rules(rules):
        y, sums = jax.jit(apply)(params, x, valid)
    # A device has 64 choices, all for the shard of experts 6 and 7; 64 / 4 shards are taken. The
    # better choice, expert 7, of the first 16 tokens goes first; everything else is dropped.
    assert float(sums.dropped) == 7 * (64 - 16) + (40 - 16)
    assert sums.counts.tolist() == [0] * 6 + [8 * 32 - 12] * 2
    one = dataclasses.replace(config, experts_per_token=1, normalize_weights=False)
    share = jax.nn.softmax(x @ params["router"])[..., 6:]
    first, _ = jax.jit(functools.partial(loop, one))(params, x, valid)
    close(y[:, :16], (first / share.sum(-1, keepdims=True))[:, :16])  # normalised over both
    assert not np.any(y[:, 16:])
    dropped = router_metrics(sums)["moe/dropped"].mean
    np.testing.assert_allclose(dropped, sums.dropped / (2 * (8 * 32 - 12)))


def test_padding_does_not_disturb_others():
    x, valid = inputs()
    other = jnp.where(valid[..., None], x, 100.0 * x[::-1] + 7)
    apply, params, _ = pure()
    f = jax.jit(jax.value_and_grad(value(apply), (0, 1), has_aux=True))
    mesh = MeshConfig(expert=4, data=2)
    with use_rules(make_rules(mesh, make_mesh(mesh))):
        result, changed = f(params, x, valid), f(params, other, valid)
    y, changed_y = (np.where(valid[..., None], r[0][1][0], 0) for r in (result, changed))
    close((result[0][0], y, result[1][0]), (changed[0][0], changed_y, changed[1][0]), 1e-6)
    assert not np.any(np.where(valid[..., None], 0, result[1][1]))


def test_losses_by_hand():
    even = RouterSums(
        tokens=jnp.array(4.0), counts=jnp.full(4, 2.0), probabilities=jnp.full(4, 1.0),
        z=jnp.array(12.0), dropped=jnp.array(1.0),
    )  # fmt: skip
    # Everyone chose experts 0 and 1, which have probability 0.4 each: 4/2 * (0.4 + 0.4) = 1.6.
    skewed = RouterSums(
        tokens=jnp.array(10.0), counts=jnp.array([10.0, 10, 0, 0]),
        probabilities=jnp.array([4.0, 4, 1, 1]), z=jnp.array(5.0), dropped=jnp.array(0.0),
    )  # fmt: skip
    config = MoeConfig(num_experts=4, mlp_dim=1, load_balance=0.1, router_z=0.01)
    np.testing.assert_allclose(router_loss(config, even), 0.1 * 1 + 0.01 * 3, rtol=1e-6)
    np.testing.assert_allclose(router_loss(config, skewed), 0.1 * 1.6 + 0.01 * 0.5, rtol=1e-6)
    both = jax.tree.map(lambda *a: jnp.stack(a), even, skewed)
    np.testing.assert_allclose(router_loss(config, both), 0.13 + 0.165, rtol=1e-6)
    means = {name: float(w.mean) for name, w in router_metrics(both).items()}
    expected = {
        "moe/load_balance": 1.3, "moe/router_z": 17 / 14, "moe/dropped": 1 / 28,
        "moe/max_load": 1.5,
    }  # fmt: skip
    assert means == pytest.approx(expected, rel=1e-6)
    zero = RouterSums.zeros(4)
    assert float(router_loss(config, zero)) == 0.0
    assert all(np.isfinite(float(w.mean)) for w in router_metrics(zero).values())


def test_z_is_the_squared_logsumexp():
    apply, params, _ = pure()
    x, valid = inputs()
    _, sums = jax.jit(apply)(params, x, valid)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(sums.z, (log_z**2 * valid).sum(), rtol=1e-5)


def test_under_vmap_of_a_pipeline():
    config = dataclasses.replace(UNGATED, round_factor=0.5)
    apply, params, _ = pure(config)
    x, valid = inputs()
    xs = jnp.stack([x, x[::-1] * 0.5])
    stages = jax.tree.map(lambda a: jnp.stack([a, 0.7 * a[::-1]]), params)

    def total(stages, xs):
        each = jax.vmap(value(apply, config), (0, 0, None), spmd_axis_name="pipeline")
        return jnp.sum(each(stages, xs, valid)[0])

    grad = lambda: jax.jit(jax.value_and_grad(total, (0, 1)))  # noqa: E731
    expected = grad()(stages, xs)
    mesh = MeshConfig(pipeline=2, expert=2, fsdp=2)
    rules = make_rules(mesh, make_mesh(mesh))
    with use_rules(rules.within_pipeline()):
        close(grad()(stages, xs), expected)


@pytest.mark.slow
def test_inside_checkpoint_and_scan():
    apply, params, _ = pure(UNGATED)
    x, valid = inputs()
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), params)

    def scanned(checkpoint):
        def body(x, layer):
            y, sums = apply(layer, x, valid)
            return x + y, sums

        def f(stacked):
            y, sums = jax.lax.scan(jax.checkpoint(body) if checkpoint else body, x, stacked)
            return jnp.sum(jnp.sin(y)) + router_loss(UNGATED, sums)

        return jax.jit(jax.value_and_grad(f))(stacked)

    mesh = MeshConfig(expert=4, fsdp=2)
    expected = scanned(False)
    with use_rules(make_rules(mesh, make_mesh(mesh))):
        close(scanned(True), expected)


@pytest.mark.parametrize("wide", [True, False])
def test_bfloat16_is_close_to_float32(wide):
    x, valid = inputs(jnp.bfloat16)
    apply, params, _ = pure()
    exact, exact_grads = run(apply, params, x.astype(jnp.float32), valid)
    apply, params, _ = pure(compute_dtype="bfloat16", wide=wide)
    (_, (y, sums)), grads = run(apply, params, x, valid)
    close(sums, exact[1][1])  # the router computes in float32
    for a, b in zip(
        jax.tree.leaves((y, grads)), jax.tree.leaves((exact[1][0], exact_grads)), strict=True
    ):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.05 * jnp.linalg.norm(b)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads[0]))


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    "sizes", [[0, 300, 1, 131], [128, 256, 0, 0], [0, 0, 0, 0], [0, 0, 0, 432]]
)
def test_grouped_matmul(sizes, wide):
    rng = np.random.default_rng(0)
    shapes = ((432, 8), (432, 12), (4, 8, 12))
    rows, g, w = (rng.standard_normal(shape, np.float32) for shape in shapes)
    precision, used = Precision("float32", wide), sum(sizes)
    expert = np.repeat(np.arange(4), sizes)
    out = jax.jit(functools.partial(grouped_matmul, precision))(rows, w, jnp.array(sizes))
    close(out[:used], np.einsum("md,mdf->mf", rows[:used], w[expert]))
    transposed = functools.partial(grouped_matmul, precision, transposed=True)
    out = jax.jit(transposed)(g, w, jnp.array(sizes))
    close(out[:used], np.einsum("mf,mdf->md", g[:used], w[expert]))
    out = jax.jit(functools.partial(grouped_gradient, precision))(rows, g, jnp.array(sizes))
    own = np.eye(4, dtype=np.float32)[expert]
    close(out, np.einsum("me,md,mf->edf", own, rows[:used], g[:used]))


@pytest.mark.parametrize("sizes", [[0, 1, 0, 2], [1, 1, 1, 0], [5, 0, 6, 0], [0, 0, 0, 0]])
def test_few_rows(sizes):
    """Fewer than a block, as in decoding, and no multiple of eight."""
    num_rows, used = 11, sum(sizes)
    rng = np.random.default_rng(0)
    shapes = ((num_rows, 8), (num_rows, 12), (4, 8, 12))
    rows, g, w = (rng.standard_normal(shape, np.float32) for shape in shapes)
    expert = np.repeat(np.arange(4), sizes)
    out = jax.jit(functools.partial(grouped_matmul, Precision()))(rows, w, jnp.array(sizes))
    close(out[:used], np.einsum("md,mdf->mf", rows[:used], w[expert]))
    out = jax.jit(functools.partial(grouped_gradient, Precision()))(rows, g, jnp.array(sizes))
    own = np.eye(4, dtype=np.float32)[expert]
    close(out, np.einsum("me,md,mf->edf", own, rows[:used], g[:used]))


def test_few_rows_make_a_small_block():
    shapes = [(11, 8), (4, 8, 12), (4,)]
    specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes[:2]]
    specs.append(jax.ShapeDtypeStruct(shapes[2], jnp.int32))
    text = jax.jit(functools.partial(grouped_matmul, Precision())).lower(*specs).as_text()
    assert "tensor<16x8xf32>" in text
    assert "tensor<128x8xf32>" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 9}, r"experts_per_token = 9: expected at most num_experts = 8"),
        ({"capacity_factor": 0.5}, r"capacity_factor = 0\.5: expected at least 1"),
        ({"round_factor": 0.0}, r"round_factor = 0\.0"),
        ({"shared_dim": 0}, r"shared_dim = 0: expected at least 1"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(CONFIG, **change)
    assert "\n" not in str(error.value)


def test_experts_that_do_not_divide_are_refused():
    config = dataclasses.replace(CONFIG, num_experts=6)
    apply, params, _ = pure(config)
    mesh = MeshConfig(expert=4, data=2)
    with (
        use_rules(make_rules(mesh, make_mesh(mesh))),
        pytest.raises(
            ValueError, match=r"'experts' of size 6 .* expert of size 4 .* is 3"
        ) as error,
    ):
        apply(params, *inputs())
    assert "\n" not in str(error.value)


def test_the_gradient_kernel_of_tpus():
    """Its unused rows may hold anything, and so may those of the other form."""
    sizes = jnp.array([0, 300, 1, 59])
    rows = jax.random.normal(jax.random.key(0), (432, 8)).at[360:].set(jnp.nan)
    g = jax.random.normal(jax.random.key(1), (432, 12)).at[360:].set(jnp.nan)
    own = jax.nn.one_hot(np.repeat(np.arange(4), sizes), 4)
    expected = jnp.einsum("me,md,mf->edf", own, rows[:360], g[:360], precision="highest")
    close(_pallas_gradient(rows, g, sizes, interpret=True), expected)
    close(grouped_gradient(Precision("float32", False), rows, g, sizes), expected)
