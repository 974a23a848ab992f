"""What is frozen keeps its bits and has no optimizer state; lower layers learn more slowly."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import make_model, params_of, random_batch, run_config

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import flat
from llm_jax.optim.freeze import trained_part
from llm_jax.optim.layer_decay import layer_scales, scaled
from llm_jax.optim.make import OptimizerConfig, make_optimizer
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import LogicalAxes
from llm_jax.training.program import axes_of, build_program


def shapes_and_axes(**changes):
    model = make_model(**changes)
    return params_of(model), axes_of(nnx.state(model, nnx.Param))


def starts(*freeze, **changes):
    return dict(trained_part(freeze, *shapes_and_axes(**changes)).starts)


def test_patterns():
    assert starts("embed") == {"embed": None}
    assert set(starts("stack.layers.mlp.*", "head")) == {
        "head", *(f"stack.layers.mlp.{m}" for m in ("up", "down", "gate"))
    }  # fmt: skip
    first = starts("stack.layers[:1].*")
    assert set(first.values()) == {1}
    assert all(path.startswith("stack.layers.") for path in first)
    assert set(starts("stack.layers[:2].*").values()) == {None}
    assert starts("stack.layers[:0].*") == {}
    assert starts("stack.layers[:1].mlp.up", "stack.layers.mlp.up") == {"stack.layers.mlp.up": None}
    assert starts("stack.layers.mlp.up", "stack.layers[:1].mlp.up") == {"stack.layers.mlp.up": None}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            "stack.layer.*",
            r"freeze 'stack.layer.\*' matches no parameter; did you mean 'stack.layers",
        ),
        ("stack.layers[:3].*", r"'stack.layers\[:3\].\*': stack.layers.* has 2 stacked layers"),
        ("emb[:1]ed", "embed has no stacked layers"),
        ("*", "leaves nothing to train"),
    ],
)
def test_errors(freeze, message):
    with pytest.raises(ConfigError, match=message) as error:
        starts(freeze)
    assert "\n" not in str(error.value)


def test_training_leaves_what_is_frozen_to_the_bit():
    """Sharded and with accumulation, under weight decay."""
    freeze = ("embed", "stack.layers[:1].*", "stack.layers.mlp_norm.*")
    run = run_config(
        optimizer={"freeze": freeze, "weight_decay": 0.1}, train={"accumulate_steps": 2}
    )
    program = build_program(run, make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))
    state = program.init(jax.random.key(0))
    before, moments = flat(jax.device_get(state.params)), flat(state.opt_state[1][0].mu)
    for seed in range(2):
        state, metrics = program.step(state, random_batch(seed=seed))
    after = flat(jax.device_get(state.params))
    for path in before:
        moved = np.any(before[path] != after[path], axis=tuple(range(1, before[path].ndim)))
        if path in ("embed", "stack.layers.mlp_norm.scale"):
            assert path not in moments
            assert not moved.any()
        elif "layers" in path:
            assert moved.tolist() == [False, True]
            assert moments[path].shape == (1, *before[path].shape[1:])
        else:
            assert moved.all()
    assert moments["stack.layers.attention.query"].sharding.spec == jax.P(None, "fsdp", None, None)
    assert metrics["grad_norm"] > 0
    assert program.num_trained == sum(x.size for x in moments.values())


AXES = {
    "embed": LogicalAxes(("vocab", "embed")),
    "encoder": {"layers": {"up": LogicalAxes(("layers", "embed", "mlp"))},
                "relative_bias": {"table": LogicalAxes((None, "heads"))},
                "final_norm": {"scale": LogicalAxes(("features",))}},
    "decoder": {"layers": {"up": LogicalAxes(("layers", "embed", "mlp"))}},
    "class_head": {"weights": LogicalAxes(("embed", None))},
}  # fmt: skip
PARAMS = {
    "embed": np.ones((3, 2)),
    "encoder": {"layers": {"up": np.ones((2, 2, 2))},
                "relative_bias": {"table": np.ones((2, 2))},
                "final_norm": {"scale": np.ones(2)}},
    "decoder": {"layers": {"up": np.ones((3, 2, 2))}},
    "class_head": {"weights": np.ones((2, 2))},
}  # fmt: skip
PARAMS = jax.tree.map(np.float32, PARAMS)


def test_scales_of_an_encoder_and_a_decoder():
    scales = flat(layer_scales(0.5, PARAMS, AXES))
    assert scales["encoder.layers.up"].ravel().tolist() == [0.25, 0.5]
    assert scales["decoder.layers.up"].ravel().tolist() == [0.125, 0.25, 0.5]
    assert scales["embed"] == scales["encoder.relative_bias.table"] == 0.5**4
    assert scales["encoder.final_norm.scale"] == scales["class_head.weights"] == 1.0


def test_one_step_of_adam_by_hand():
    config = OptimizerConfig(weight_decay=0.1, clip_norm=None, epsilon=1e-8)
    optimizer = make_optimizer(config, optax.constant_schedule(0.01), AXES)
    optimizer = scaled(optimizer, layer_scales(0.5, PARAMS, AXES))
    grads = jax.tree.map(lambda p: np.full_like(p, 3.0), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    # The first step of Adam is the gradient's sign; decay adds 0.1 of a parameter that is 1.
    step = -0.01 * (1.0 + 0.1 * 1.0)
    np.testing.assert_allclose(updates["embed"], step / 16, rtol=1e-5)
    up = updates["decoder"]["layers"]["up"]
    np.testing.assert_allclose(up[:, 0, 0], [step / 8, step / 4, step / 2], rtol=1e-5)
    np.testing.assert_allclose(updates["class_head"]["weights"], step, rtol=1e-5)
    np.testing.assert_allclose(updates["encoder"]["final_norm"]["scale"], -0.01, rtol=1e-5)


def test_layer_decay_of_layers_that_are_left():
    trained = trained_part(("decoder.layers[:1].*", "embed"), PARAMS, AXES)
    scales = flat(trained.part(layer_scales(0.5, PARAMS, AXES)))
    assert scales["decoder.layers.up"].ravel().tolist() == [0.25, 0.5]
    assert "embed" not in scales
    part = trained.part(PARAMS)
    optimizer = make_optimizer(OptimizerConfig(), lambda step: 0.01, trained.axes(AXES))
    optimizer = scaled(optimizer, trained.part(layer_scales(0.5, PARAMS, AXES)))
    updates, _ = optimizer.update(part, optimizer.init(part), part)
    whole = trained.joined(jax.tree.map(np.add, part, updates), PARAMS)
    moved = np.asarray(whole["decoder"]["layers"]["up"] != 1.0).all((1, 2))
    assert moved.tolist() == [False, True, True]
    assert whole["embed"] is PARAMS["embed"]


def test_layer_decay_out_of_range():
    with pytest.raises(ValueError, match=r"layer_decay = 1.5 must lie in \(0, 1\]"):
        OptimizerConfig(layer_decay=1.5)
