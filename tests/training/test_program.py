"""One program on many meshes."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from tiny import FAMILIES, assert_trees_close, model_section, random_batch, run_config

from llm_jax.core.config import ConfigError, load
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.place import row_share, to_global_batch
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program

ONE = {"data": 1}


def mesh_of(sizes: dict):
    config = MeshConfig(**sizes)
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def train(run, mesh_sizes, steps=3, batches=3):
    """Losses of `steps` over `batches` in turn, and the parameters after them."""
    program = build_program(run, mesh_of(mesh_sizes))
    state = program.init(jax.random.key(0))
    losses = []
    for step in range(steps):
        rows = random_batch(run.train.batch_size, seed=step % batches)
        batch = to_global_batch(rows, program.rules, run.train.batch_size)
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state.params)


@functools.cache
def gpt2_on_one_device():
    return train(run_config(model=model_section(**FAMILIES["gpt2"])), ONE)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        {"data": 1, "fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_every_mesh_gives_the_same_losses(sizes):
    """Over steps of the optimizer; the gradients of other models are in test_meshes.py."""
    run = run_config(model=model_section(**FAMILIES["gpt2"]))
    losses, params = gpt2_on_one_device()
    sharded_losses, sharded_params = train(run, sizes)
    np.testing.assert_allclose(sharded_losses, losses, atol=1e-5)
    assert_trees_close(sharded_params, params, atol=2e-3)


@pytest.mark.parametrize("sizes", [ONE, {"data": 2, "fsdp": 2}])
def test_accumulation_equals_one_big_batch(sizes):
    whole, params = train(run_config(), sizes)
    parts, accumulated = train(run_config(train={"accumulate_steps": 2}), sizes)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert_trees_close(accumulated, params, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["lion", "adafactor", pytest.param("muon", marks=pytest.mark.slow)]
)
def test_every_optimizer_learns_on_a_mesh(name):
    run = run_config(optimizer={"name": name})
    losses, _ = train(run, {"data": 2, "tensor": 2}, steps=6, batches=1)
    reference, _ = train(run, ONE, steps=6, batches=1)
    np.testing.assert_allclose(losses, reference, atol=1e-4)
    assert losses[-1] < losses[0]


def test_state_is_placed_by_the_rules_and_donated():
    program = build_program(run_config(), mesh_of({"data": 2, "fsdp": 2, "tensor": 2}))
    state = program.init(jax.random.key(0))
    query = state.params["stack"]["layers"]["attention"]["query"]
    assert query.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    moment = state.opt_state[1][0].mu["stack"]["layers"]["attention"]["query"]
    assert moment.sharding == query.sharding
    program.step(state, to_global_batch(random_batch(), program.rules, 8))
    assert query.is_deleted()


def test_variant_of_a_config():
    run = resolve(load("configs/gpt2_124m.py:sentencepiece"))
    assert run.data.tokenizer.name == "sentencepiece"
    with pytest.raises(ValueError, match="choices: tiktoken, sentencepiece"):
        load("configs/gpt2_124m.py:bpe")


def test_gpt_1b_lowers_for_256_devices(run_python):
    code = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"
from llm_jax.core.config import load
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program
run = resolve(load("configs/gpt_1b.py", ["mesh.tensor=4"]))
program = build_program(run, make_mesh(run.mesh))
text = program.lower().as_text()
print(dict(program.mesh.shape), program.num_params, text.count("\\n"))
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    shape, params, lines = re.match(r"(\{.*\}) (\d+) (\d+)", result.stdout).groups()
    assert "'fsdp': 64" in shape
    assert "'tensor': 4" in shape
    assert 1.2e9 < int(params) < 1.5e9
    assert int(lines) < 5000  # scanned: it would be some 24 times as long


@pytest.mark.parametrize(
    ("sections", "sizes", "message"),
    [
        ({"train": {"batch_size": 6}}, {"data": 4}, "batch_size 6 .* does not divide .* size 4"),
        (
            {"model": model_section(num_kv_heads=1)},
            {"data": 1, "tensor": 2},
            r"attention\.key: axis 'kv_heads' of size 1 does not divide over mesh tensor",
        ),
        ({"model": {"vocab_size": 63}}, {"data": 1, "tensor": 2}, "embed: axis 'vocab' of size 63"),
    ],
)
def test_what_does_not_divide_is_named(sections, sizes, message):
    with pytest.raises(ConfigError, match=message):
        build_program(run_config(**sections), mesh_of(sizes))


def test_rows_of_one_process():
    share = row_share(build_program(run_config(), mesh_of({"data": 4})).rules, 8)
    assert dataclasses.astuple(share) == (0, 1)
