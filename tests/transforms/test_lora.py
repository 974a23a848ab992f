"""LoRA: begins as the base, trains only what it adds, merges, and lies on a mesh."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import assert_trees_close, make_model, params_of, random_batch, run, run_config

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.paths import flat
from llm_jax.core.reference import frozen_reference
from llm_jax.nn.moe import MoeConfig
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program
from llm_jax.transforms import Frozen, merged, transformed
from llm_jax.transforms.lora import Config, Sides, sides

ONE = {"data": 1}


def lora_run(lora: dict, **sections):
    return resolve(
        {**to_dict(run_config(**sections)), "transforms": [{"name": "lora", "rank": 2, **lora}]}
    )


def program_on(config, sizes=ONE):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    return build_program(config, mesh)


def trained(program, steps=3):
    state = program.init(jax.random.key(0))
    losses = []
    for step in range(steps):
        batch = to_global_batch(random_batch(8, seed=step), program.rules, 8)
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def adapted(model, **lora):
    return transformed(nnx.clone(model), [Config(rank=2, **lora)], nnx.Rngs(1))


def with_random_b(model):
    """As after training: B is zero only at first."""
    for path, variable in nnx.iter_graph(model):
        if path and path[-1] == "lora_b":
            variable[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), variable.shape)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(num_kv_heads=2)


@pytest.fixture(scope="module")
def program():
    return program_on(lora_run({}))


@pytest.fixture(scope="module")
def after(program):
    return trained(program)


def test_it_begins_as_the_base_to_the_bit(model):
    batch = random_batch(2)
    np.testing.assert_array_equal(run(adapted(model), batch).logits, run(model, batch).logits)


def test_only_what_it_adds_is_trained(program, after):
    state, losses = after
    assert all(path.endswith(("lora_a", "lora_b")) for path in flat(state.params))
    assert losses[-1] < losses[0]
    before = program.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.extra, before.extra)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), state.params, before.params)
    assert all(jax.tree.leaves(moved))
    moments = state.opt_state[1][0].mu
    assert flat(moments).keys() == flat(state.params).keys()
    assert program.num_trained == sum(x.size for x in jax.tree.leaves(state.params))
    assert program.num_params == sum(x.size for x in jax.tree.leaves(params_of(make_model())))


def test_merged_equals_unmerged(program, after):
    both = program.model(after[0])
    one = merged(both)
    assert flat(params_of(one)).keys() == flat(params_of(make_model())).keys()
    assert not any(isinstance(node, Frozen) for _, node in nnx.iter_graph(one))
    batch = random_batch(2)
    np.testing.assert_allclose(run(one, batch).logits, run(both, batch).logits, atol=1e-5)


def test_merged_is_the_formula(model):
    weights = with_random_b(adapted(model, targets=("*.attention.out",), alpha=6.0))
    a, b = (
        np.asarray(getattr(weights.stack.layers.attention.out, name)[...])
        for name in ("lora_a", "lora_b")
    )
    base = np.asarray(model.stack.layers.attention.out[...])
    expected = base + 3.0 * np.einsum("lnhr,lrd->lnhd", a, b)
    out = params_of(merged(weights))["stack"]["layers"]["attention"]["out"]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_the_model_before_training_is_still_there(model):
    start = adapted(model, quantize="int8")
    batch = random_batch(2)
    expected = run(start, batch).logits
    trained = with_random_b(start)
    assert np.abs(run(trained, batch).logits - expected).max() > 1e-3
    np.testing.assert_array_equal(run(frozen_reference(trained), batch).logits, expected)


def test_every_mesh_gives_the_same(after):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    sharded = program_on(lora_run({}), sizes)
    query = sharded.state_shardings.extra["stack"]["layers"]["attention"]["query"]["base"]
    assert query.spec == jax.P(None, "fsdp", "tensor", None)
    state, losses = trained(sharded)
    np.testing.assert_allclose(losses, after[1], atol=1e-5)
    assert_trees_close(jax.device_get(state.params), jax.device_get(after[0].params), atol=2e-3)
    out = merged(sharded.model(state)).stack.layers.attention.out[...]
    assert out.sharding.spec == jax.P(None, "tensor", None, "fsdp")


def test_quantized_in_a_pipeline():
    """Integers pass through the loops over stages and layers, and have no gradient."""
    config = lora_run({"quantize": "nf4"}, mesh={"pipeline": 2})
    program = program_on(config, {"data": 1, "pipeline": 2})
    out = jax.eval_shape(program.step, program.abstract_state, program.batch_spec)[0]
    assert jax.tree.map(lambda x: x.dtype, out.extra) == jax.tree.map(
        lambda x: x.dtype, program.abstract_state.extra
    )
    base = program.state_shardings.extra["stack"]["layers"]["mlp"]["up"]["base"]
    assert base["codes"].spec[0] == base["scales"].spec[0] == "pipeline"


def test_every_expert_is_adapted():
    model = make_model(experts=MoeConfig(num_experts=2, mlp_dim=16))
    weights = with_random_b(adapted(model, targets=("*.mlp.*",)))
    assert weights.stack.layers.mlp.down.lora_b.shape == (2, 2, 2, 32)  # [L, E, r, D]
    assert isinstance(weights.stack.layers.mlp.router, Frozen)
    batch = random_batch(2)
    plain = merged(weights)
    assert np.any(plain.stack.layers.mlp.down[...] != model.stack.layers.mlp.down[...])
    np.testing.assert_allclose(run(weights, batch).logits, run(plain, batch).logits, atol=1e-5)


def test_what_is_a_matrix():
    assert sides("a.query", ("layers", "embed", "heads", "head_dim")) == Sides(1, 1, 2)
    assert sides("a.out", ("layers", "heads", "head_dim", "embed")) == Sides(1, 2, 1)
    assert sides("m.up", ("layers", "experts", "expert_embed", "mlp")) == Sides(2, 1, 1)
    assert sides("m.down", ("layers", "experts", "mlp", "expert_embed")) == Sides(2, 1, 1)
    assert sides("m.router", ("layers", "embed", "router")) is None
    assert sides("a.query_bias", ("layers", "heads", "head_dim")) is None
    assert sides("n.scale", ("layers", "features")) is None


def test_what_is_trained_whole(model):
    params = flat(params_of(adapted(model, targets=("*.mlp.*",), full=("final_norm.*",))))
    adapters = {f"stack.layers.mlp.{m}.lora_{x}" for m in ("up", "down", "gate") for x in "ab"}
    assert params.keys() == adapters | {"final_norm.scale"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("*.atention.*",)}, r"transforms\.lora\.targets '\*\.atention\.\*' matches no "
         r"parameter; did you mean '.*attention.*'"),
        ({"targets": ("*.scale",)}, "match no matrix"),
        ({"full": ("class_head.*",)}, "transforms.lora.full 'class_head.*' matches no parameter"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"quantize": "nf5"}, "'nf5'; did you mean 'nf4'.; choices: none, int8, nf4"),
    ],
)  # fmt: skip
def test_errors(lora, message):
    with pytest.raises(ConfigError, match=message) as error:
        program_on(lora_run(lora))
    assert "\n" not in str(error.value)
