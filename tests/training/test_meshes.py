"""Every mesh axis alone, in pairs, and four at once, gives the loss and gradients of one device."""

import functools
import itertools
import math

import conftest  # noqa: F401  fake devices, also where this file is imported alone
import jax
import pytest
from tiny import assert_trees_close, model_section, random_batch, run_config

from llm_jax.sharding.mesh import AXES, make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import use_rules
from llm_jax.training.program import build_program
from llm_jax.training.step import gradients

LENGTH, ROWS = 32, 16
MODEL = {"num_layers": 4, "num_kv_heads": 2, "qk_norm": True}
FAMILIES = {
    "dense": {},
    "deep": {"num_layers": 8},
    "experts": {"experts": {"num_experts": 4, "mlp_dim": 32}},
}
ALONE = [{axis: 8 if axis in ("data", "fsdp", "expert") else 2} for axis in AXES]
# Eight devices each: the first of these that is in a pair gets four.
WIDE = ("data", "fsdp", "expert", "context", "pipeline")
PAIRS = [
    {a: 2, b: 2} | {next(axis for axis in WIDE if axis in (a, b)): 4}
    for a, b in itertools.combinations(AXES, 2)
]
FOUR = {"fsdp": 2, "context": 2, "tensor": 2, "pipeline": 2}
FOUR_OF_EXPERTS = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2}


def program_of(sizes: dict, family: str, accumulate_steps: int = 1, **mesh):
    run = run_config(
        model=model_section(**{**MODEL, **FAMILIES[family]}),
        train={"batch_size": ROWS, "accumulate_steps": accumulate_steps},
        mesh={"data": 1, **sizes, **mesh},
    )
    devices = jax.devices()[: math.prod(sizes.values())]
    return build_program(run, make_mesh(run.mesh, devices))


@functools.cache
def initial_params(family: str):
    return jax.device_get(program_of({}, family).init(jax.random.key(0)).params)


def loss_and_gradients(sizes: dict, family: str, *, accumulate_steps: int = 1, **mesh):
    """Of one packed batch in float32, on a mesh of these sizes."""
    program = program_of(sizes, family, accumulate_steps, **mesh)
    params = jax.device_put(initial_params(family), program.state_shardings.params)
    batch = to_global_batch(random_batch(ROWS, LENGTH), program.rules, ROWS)

    @jax.jit
    def compute(params, batch):
        with use_rules(program.rules):
            grads, loss, metrics = gradients(
                params, {}, batch, jax.random.key(1), graphdef=program.graphdef,
                objective=program.objective, accumulate_steps=accumulate_steps,
            )  # fmt: skip
        return jax.tree.map(lambda g: g / loss.weight, grads), {"loss": loss, **metrics}

    grads, sums = compute(params, batch)
    return jax.device_get(grads), {name: float(value.mean) for name, value in sums.items()}


@functools.cache
def one_device(family: str):
    return loss_and_gradients({}, family)


def check(sizes, family="dense", **mesh):
    grads, sums = loss_and_gradients(sizes, family, **mesh)
    expected, expected_sums = one_device(family)
    for name, value in expected_sums.items():
        assert sums[name] == pytest.approx(value, abs=1e-5), name
    assert_trees_close(grads, expected, atol=1e-5)


@pytest.mark.slow
def test_four_axes_at_once(run_python):
    """On 16 devices."""
    code = "import test_meshes as t; t.check(t.FOUR); t.check(t.FOUR_OF_EXPERTS, 'experts')"
    env = {"FAKE_DEVICES": "16", "PYTHONPATH": "tests:tests/training"}
    result = run_python("-c", code, env=env)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow  # to find which of a pair it is
@pytest.mark.parametrize("sizes", ALONE, ids=str)
def test_each_axis_alone(sizes):
    check(sizes)


@pytest.mark.parametrize("sizes", PAIRS, ids=str)
def test_axes_in_pairs(sizes):
    check(sizes)


# Experts meet fsdp, data and tensor in FOUR_OF_EXPERTS, and each of these axes another in PAIRS.
ALSO = ("data", "fsdp", "tensor", "context", "pipeline")
ALSO_TOGETHER = [pytest.param(axis, marks=pytest.mark.slow) for axis in ALSO]


@pytest.mark.parametrize("axis", ["expert", *ALSO_TOGETHER])
def test_experts_on_each_axis(axis):
    check({axis: 2} if axis == "expert" else {"expert": 2, axis: 2}, "experts")


@pytest.mark.parametrize("rules", ["sequence", "zero1"])
def test_other_rules(rules):
    check({"fsdp": 2, "tensor": 2, "context": 2}, rules=rules)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "rounds"), [(2, 4), (2, 2), (4, 1)])
def test_circular_pipelines(stages, rounds):
    check({"pipeline": stages, "fsdp": 2}, "deep", pipeline_rounds=rounds, microbatches=4)


@pytest.mark.slow
def test_accumulating_copies_balance_their_experts_together():
    sizes = {"data": 2, "expert": 2}
    grads, sums = loss_and_gradients(sizes, "experts", accumulate_steps=2)
    expected, expected_sums = loss_and_gradients({}, "experts", accumulate_steps=2)
    assert sums == pytest.approx(expected_sums, abs=1e-5)
    assert_trees_close(grads, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("rules", ["default", "zero1"])
def test_accumulated_gradients(sizes, rules):
    check(sizes, rules=rules, accumulate_steps=2)
