"""The circular pipeline: order of layers, what it waits, and schedules that do not fit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny import model_section, run_config

from llm_jax.nn.pipeline import bubble, check_pipeline, run_pipeline
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules
from llm_jax.training.program import build_program

LAYERS, ROWS, LENGTH, EMBED = 8, 16, 2, 4
# (stages, rounds, microbatches); the first waits most, the others hide it by rounds or microbatches.
SCHEDULES = [(4, 1, 4), (2, 1, 8), (2, 2, 2), (2, 4, 4), (4, 2, 8)]


def rules_of(stages, rounds, microbatches, **sizes):
    config = MeshConfig(
        data=1, pipeline=stages, pipeline_rounds=rounds, microbatches=microbatches, **sizes
    )
    count = stages * math.prod(sizes.values())
    return make_rules(config, make_mesh(config, jax.devices()[:count]))


def weights():
    values = jax.random.normal(jax.random.key(0), (LAYERS, EMBED, EMBED)) / 2
    return nnx.State({"w": nnx.Param(values, axes=("layers", "embed", None))})


def layer(params, index, x, rows, microbatch):
    """Layers do not commute; each also tells its number and which rows and microbatch it saw."""
    x = jnp.tanh(x @ params["w"][...] + 0.1 * index + rows[..., None])
    seen = {"rows": jnp.sum(rows), "index": index.astype(jnp.float32), "microbatch": microbatch}
    return x, seen


def piped(rules):
    """A function of (weights, x, rows) and its arguments."""
    params = weights()
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, EMBED))
    rows = jnp.arange(ROWS * LENGTH, dtype=jnp.float32).reshape(ROWS, LENGTH)

    @jax.jit
    def run(params, x, rows):
        with use_rules(rules):
            return run_pipeline(layer, params, x, rows, rules)

    return run, (params, x, rows)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fsdp", [1, 2])
def test_every_row_passes_every_layer_in_order(schedule, fsdp):
    run, (params, x, rows) = piped(rules_of(*schedule, fsdp=fsdp))
    found, sums = run(params, x, rows)
    for index in range(LAYERS):
        one = jax.tree.map(lambda w, index=index: w[index], params)
        x, _ = layer(one, jnp.int32(index), x, rows, 0)
    np.testing.assert_allclose(found, x, atol=1e-6)
    # The sums of each layer are over all microbatches, each once, and over none that is not there.
    microbatches = schedule[2]
    np.testing.assert_array_equal(sums["rows"], [rows.sum()] * LAYERS)
    np.testing.assert_array_equal(sums["index"], microbatches * np.arange(LAYERS))
    each = microbatches * (microbatches - 1) // 2
    np.testing.assert_array_equal(sums["microbatch"], [each] * LAYERS)


def scans(jaxpr):
    """Trips of the scans of a traced program, outer ones first."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"]
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from scans(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_bubble_is_the_share_of_turns_without_work(schedule):
    _, rounds, microbatches = schedule
    rules = rules_of(*schedule)
    run, arguments = piped(rules)
    turns = next(scans(jax.make_jaxpr(run)(*arguments).jaxpr))
    worked = rounds * microbatches  # of each stage, one group of layers a turn
    assert bubble(rules) == pytest.approx(1 - worked / turns)


def test_rounds_and_microbatches_shrink_the_bubble():
    waits = [bubble(rules_of(*schedule)) for schedule in [(4, 1, 4), (4, 1, 16), (4, 4, 16)]]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] == pytest.approx(3 / 7)
    assert bubble(rules_of(1, 1, 1)) == 0


@pytest.mark.parametrize(
    ("schedule", "layers", "rows", "message"),
    [
        ((2, 2, 4), 6, 16, r"6 layers .*pipeline 2 x mesh\.pipeline_rounds 2 = 4 .* works is 3"),
        ((4, 2, 4), 12, 16, r"12 layers .*pipeline 4 x .* 2 = 8 groups; the nearest"),
        ((2, 3, 4), 12, 16, r"pipeline_rounds 3 and mesh\.pipeline 2: one must be a multiple"),
        ((4, 1, 2), 8, 16, r"microbatches 2 must be at least mesh\.pipeline 4 .* works is 4"),
        ((2, 1, 5), 8, 16, r"microbatches 5 .* divide the 16 rows .* works is 4"),
        ((2, 1, 32), 8, 16, r"microbatches 32 .* divide the 16 rows .* works is 16"),
        ((4, 1, 4), 8, 2, r"divide the 2 rows .*; use a larger train\.batch_size"),
    ],
    ids=str,
)  # fmt: skip
def test_schedules_that_do_not_fit(schedule, layers, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_pipeline(rules_of(*schedule), layers, rows)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_in_each_share_of_the_batch():
    rules = rules_of(2, 1, 8, fsdp=2)
    check_pipeline(rules, LAYERS, 16)
    with pytest.raises(ValueError, match=r"microbatches 8 .* divide the 4 rows .* works is 4"):
        check_pipeline(rules, LAYERS, 8)


@pytest.mark.parametrize(
    ("mesh", "layers", "train", "message"),
    [
        ({"pipeline_rounds": 2}, 6, {}, "6 layers do not divide .* 4 groups; .* works is 3"),
        ({"microbatches": 3}, 4, {}, r"microbatches 3 .* the 8 rows .* works is (2|4)"),
        ({}, 4, {"accumulate_steps": 2}, r"microbatches 8 .* the 4 rows .* works is 4"),
    ],
    ids=str,
)
def test_a_program_refuses_them_before_it_runs(mesh, layers, train, message):
    run = run_config(
        model=model_section(num_layers=layers),
        mesh={"data": 1, "pipeline": 2, **mesh},
        train={"batch_size": 8, **train},
    )
    with pytest.raises(ValueError, match=message) as caught:
        build_program(run, make_mesh(run.mesh, jax.devices()[:2])).lower()
    assert "\n" not in str(caught.value)
