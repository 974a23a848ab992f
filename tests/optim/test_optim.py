import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import FAMILIES, assert_trees_close, make_model

from llm_jax.nn.moe import MoeConfig
from llm_jax.optim.make import OptimizerConfig, is_decayed, make_optimizer, muon_dimensions
from llm_jax.optim.schedule import ScheduleConfig, make_schedule
from llm_jax.sharding.rules import logical_axes, path_name
from llm_jax.transforms import lora, transformed


def axes_of(**changes):
    return logical_axes(nnx.state(make_model(**changes), nnx.Param))


def leaves(function, axes):
    return {path_name(p): function(p, a) for p, a in jax.tree_util.tree_leaves_with_path(axes)}


def test_decay_spares_biases_and_scales():
    decayed = leaves(is_decayed, axes_of(**FAMILIES["gpt2"]))
    spared = {name for name, yes in decayed.items() if not yes}
    assert spared == {n for n in decayed if n.endswith("bias") or n.endswith("scale")}
    assert decayed["embed"]
    assert decayed["stack.layers.attention.query"]


def test_muon_takes_matrices_of_the_stack():
    dims = leaves(muon_dimensions, axes_of())
    assert dims["embed"] is None
    assert dims["head"] is None
    assert dims["stack.layers.mlp_norm.scale"] is None
    query, out = dims["stack.layers.attention.query"], dims["stack.layers.attention.out"]
    assert (query.reduction_axis, query.output_axis) == ((1,), (2, 3))
    assert (out.reduction_axis, out.output_axis) == ((1, 2), (3,))
    down = dims["stack.layers.mlp.down"]
    assert (down.reduction_axis, down.output_axis) == ((1,), (2,))


def test_muon_takes_every_expert_as_a_matrix():
    experts = MoeConfig(num_experts=4, mlp_dim=16)
    dims = leaves(muon_dimensions, axes_of(experts=experts))
    up, down = (dims[f"stack.layers.mlp.{name}"] for name in ("up", "down"))  # [L, E, D, F]
    assert (up.reduction_axis, up.output_axis) == ((2,), (3,))
    assert (down.reduction_axis, down.output_axis) == ((2,), (3,))
    assert dims["stack.layers.mlp.router"] is None


def test_muon_leaves_lora_to_adam():
    model = transformed(make_model(), [lora.Config()], nnx.Rngs(0))
    dims = leaves(muon_dimensions, logical_axes(nnx.state(model, nnx.Param)))
    assert set(dims.values()) == {None}


def test_muon_update_is_nearly_orthogonal_per_layer():
    model = make_model()
    axes = axes_of()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    config = OptimizerConfig("muon", weight_decay=0.0, clip_norm=None)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0), axes)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for layer in np.asarray(updates["stack"]["layers"]["attention"]["query"]):
        values = np.linalg.svd(layer.reshape(32, 32), compute_uv=False)
        assert values.max() / values.min() < 4  # the gradient's own ratio is above 50


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules(name):
    decay = {"decay_steps": 20} if name == "wsd" else {}
    config = ScheduleConfig(name, 1.0, warmup_steps=10, final_fraction=0.1, **decay)
    rate = np.array([make_schedule(config, 100)(step) for step in range(101)])
    assert rate[0] > 0
    assert np.all(np.diff(rate[:11]) > 0)
    assert rate[10] == pytest.approx(1.0)
    assert rate[100] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert np.all(np.diff(rate[10:]) <= 1e-6)
    if name == "wsd":
        np.testing.assert_allclose(rate[10:81], 1.0)


def test_moments_in_bfloat16():
    """Updates stay within the rounding of the moments over many steps."""
    axes, params = axes_of(), nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
    short = OptimizerConfig(momentum_dtype="bfloat16", variance_dtype="bfloat16", clip_norm=None)
    exact = OptimizerConfig(clip_norm=None)
    states, updates = {}, {}
    for config in (short, exact):
        optimizer = make_optimizer(config, lambda step: 1e-2, axes)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step in range(20):
            grads = jax.tree.map(lambda p, step=step: p + 0.1 * np.cos(step + p), params)
            updates[config], state = update(grads, state, params)
        states[config] = state
    adam = states[short][0][0]
    moments = jax.tree.leaves((adam.mu, adam.nu))
    assert {str(x.dtype) for x in moments} == {"bfloat16"}
    assert_trees_close(updates[short], updates[exact], atol=2e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule(ScheduleConfig(warmup_steps=50), 40), "warmup_steps 50 .* 40"),
        (lambda: ScheduleConfig("wsd"), "decay_steps = None"),
        (lambda: ScheduleConfig("cosine", decay_steps=5), "decay_steps = 5"),
        (lambda: OptimizerConfig(beta1=1.0), "beta1 = 1.0"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm = 0.0"),
        (lambda: OptimizerConfig(variance_dtype="bfloat16", beta2=0.999), "needs adamw and beta2"),
        (lambda: OptimizerConfig("lion", variance_dtype="bfloat16"), "name 'lion'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
