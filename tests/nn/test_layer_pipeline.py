"""The circular pipeline: order of layers, what it waits, and schedules that do not fit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny import model_section, run_config

from llm_jax.nn.pipeline import bubble, count_microbatches, run_pipeline
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
    """Layers do not commute; each also adds up over rows its number and what it saw."""
    x = jnp.tanh(x @ params["w"][...] + 0.1 * index + rows[..., None])
    count = rows.shape[0]
    return x, {"rows": rows.sum(), "index": count * index, "microbatch": count * microbatch}


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
    np.testing.assert_array_equal(sums["rows"], [rows.sum()] * LAYERS)
    np.testing.assert_array_equal(sums["index"], ROWS * np.arange(LAYERS))
    each = ROWS * (schedule[2] - 1) // 2
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
    assert bubble(rules, microbatches) == pytest.approx(1 - worked / turns)


def test_rounds_and_microbatches_shrink_the_bubble():
    schedules = [(4, 1, 4), (4, 1, 16), (4, 4, 16)]
    waits = [bubble(rules_of(*schedule), schedule[2]) for schedule in schedules]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] == pytest.approx(3 / 7)
    assert bubble(rules_of(1, 1, None), 1) == 0


@pytest.mark.parametrize(
    ("stages", "rows", "microbatches"), [(2, 16, 8), (4, 16, 16), (4, 24, 12), (2, 7, 7), (4, 4, 4)]
)
def test_where_nothing_is_said_up_to_four_microbatches_follow_for_each_stage(
    stages, rows, microbatches
):
    assert count_microbatches(rules_of(stages, 1, None), LAYERS, rows) == microbatches
    shared = rules_of(stages, 1, None, fsdp=2)
    assert count_microbatches(shared, LAYERS, 2 * rows) == microbatches


@pytest.mark.parametrize(
    ("schedule", "layers", "rows", "message"),
    [
        ((2, 2, 4), 6, 16, r"rounds 2 x mesh\.pipeline 2 must divide 6 layers.*that work: 1$"),
        ((2, 3, 4), 12, 16, r"rounds 3 x mesh\.pipeline 2 must .* of the two .* that work: 1, 2, 6$"),
        ((4, 1, 4), 6, 16, r"rounds 1 x mesh\.pipeline 4 must .*; mesh\.pipeline must divide 6$"),
        ((4, 1, 2), 8, 16, r"microbatches 2 must be at least mesh\.pipeline 4 .* works is 4"),
        ((2, 1, 5), 8, 16, r"microbatches 5 .* divide the 16 rows .* works is 4"),
        ((2, 1, 32), 8, 16, r"microbatches 32 .* divide the 16 rows .* works is 16"),
        ((4, 1, 4), 8, 2, r"needs at least 4 rows .* there are 2: use a larger train.batch_size"),
        ((4, 1, None), 8, 2, r"needs at least 4 rows .* there are 2: use a larger train.batch_size"),
    ],
    ids=str,
)  # fmt: skip
def test_schedules_that_do_not_fit(schedule, layers, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        count_microbatches(rules_of(*schedule), layers, rows)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_in_each_share_of_the_batch():
    rules = rules_of(2, 1, 8, fsdp=2)
    assert count_microbatches(rules, LAYERS, 16) == 8
    with pytest.raises(ValueError, match=r"microbatches 8 .* divide the 4 rows .* works is 4"):
        count_microbatches(rules, LAYERS, 8)


@pytest.mark.parametrize(
    ("mesh", "layers", "train", "message"),
    [
        ({"pipeline_rounds": 2}, 6, {}, "must divide 6 layers.* rounds that work: 1"),
        ({"microbatches": 3}, 4, {}, r"microbatches 3 .* the 8 rows .* works is (2|4)"),
        ({"microbatches": 8}, 4, {"accumulate_steps": 2}, r"8 .* the 4 rows .* works is 4"),
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
