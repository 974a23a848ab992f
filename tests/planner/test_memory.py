"""What fills the memory: of programs compiled here, and of dumps written by hand."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import pytest

from llm_jax.nn.losses import logits_loss
from llm_jax.planner.buffers import parse_layout
from llm_jax.planner.compiled import CompiledStep, OutOfMemory
from llm_jax.planner.make import make_plan
from llm_jax.planner.memory import read_memory
from llm_jax.planner.topology import parse_target
from llm_jax.planner.worker import compile_here
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program

CAPACITY = 2**30
LAYERS, VOCABULARY, LENGTH, ROWS = 4, 500, 128, 16


def compile_step(folder: Path, mesh, devices, train=None, **model) -> CompiledStep:
    run = resolve({
        "model": {
            "name": "gpt", "vocab_size": VOCABULARY, "embed_dim": 64, "num_layers": LAYERS,
            "num_heads": 4, "head_dim": 24, "mlp_dim": 160, "max_length": LENGTH, **model,
        },
        "data": {"sequence_length": LENGTH, "tokenizer": {"name": "raw_bytes"}},
        "mesh": mesh,
        "train": {"num_steps": 10, "batch_size": ROWS, **(train or {})},
    })  # fmt: skip
    program = build_program(run, make_mesh(run.mesh, jax.devices()[:devices]))
    return compile_here(program, run, "local", folder)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    @functools.cache
    def compile_once(name: str) -> CompiledStep:
        folder = tmp_path_factory.mktemp(name)
        if name == "one":
            return compile_step(folder, {"data": 1}, 1)
        if name == "shares":
            mesh = {"data": 1, "fsdp": 2, "tensor": 2}
            return compile_step(folder, mesh, 4, remat="full")
        return compile_step(folder, {"data": 2}, 2, {"accumulate_steps": 2}, remat="attention")

    return compile_once


def own_total(step: CompiledStep) -> int:
    """What the CPU compiler says itself; it calls "peak" the arguments alone."""
    memory = step.memory
    return memory.arguments + memory.outputs - memory.aliased + memory.temporaries


@pytest.mark.parametrize("name", ["one", "shares", "microbatches"])
def test_parts_sum_to_the_total_of_the_compiler(compiled, name):
    step = compiled(name)
    memory = read_memory(step, CAPACITY)
    assert sum(memory.parts.values()) == memory.peak
    assert memory.peak == pytest.approx(own_total(step), rel=0.02)
    assert all(size >= 0 for size in memory.parts.values())
    highest = max(size for _, size in memory.timeline)
    assert highest + memory.parts["unused"] == memory.peak
    sizes = [buffer.bytes for buffer in memory.buffers]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= 10
    assert sum(sizes) <= memory.peak - memory.parts["unused"]


@pytest.mark.parametrize("name", ["one", "shares"])
def test_every_parameter_is_a_buffer_with_its_path_and_sharding(compiled, name):
    step = compiled(name)
    buffers = [b for b in read_memory(step, CAPACITY).buffers if b.part == "parameters"]
    parameters = {a.path: a for a in step.arguments if a.kind == "parameter"}
    assert {f"params.{b.module}" for b in buffers} == set(parameters)
    for buffer in buffers:
        argument = parameters[f"params.{buffer.module}"]
        assert (buffer.logical_shape, buffer.shape) == (argument.shape, argument.shard_shape)
        assert buffer.bytes >= argument.bytes
        assert buffer.dtype == "f32"
    up = next(b for b in buffers if b.module == "stack.layers.mlp.up")
    assert up.sharding == ("[-, fsdp, tensor]" if name == "shares" else "[-, -, -]")


@pytest.mark.parametrize("name", ["one", "shares", "microbatches"])
def test_each_of_the_largest_has_its_module_and_its_line(compiled, name):
    buffers = make_plan(compiled(name), parse_target("local")).memory.buffers
    for buffer in buffers[:10]:
        assert buffer.module
        assert buffer.source.startswith("llm_jax/"), buffer
    lines = {b.module: b.source for b in buffers if b.part in ("parameters", "optimizer")}
    moments = {name: line for name, line in lines.items() if ".mu." in name or ".nu." in name}
    assert len(moments) > 10
    for moment, line in moments.items():
        parameter = next(name for name in lines if moment.endswith((f".mu.{name}", f".nu.{name}")))
        assert line == lines[parameter]
    assert lines["stack.layers.mlp.up"].startswith("llm_jax/nn/mlp.py:")


def test_what_the_layers_keep_is_found_and_follows_remat(compiled):
    keeps = {}
    for name in ("one", "microbatches"):
        memory = read_memory(compiled(name), CAPACITY)
        keeps[name] = {b.module for b in memory.buffers if b.part == "activations"}
        assert all(b.source for b in memory.buffers if b.part == "activations")
    assert "stack.layers.mlp" in keeps["one"]
    assert "stack.layers.attention" in keeps["one"]
    stacks = [
        b.shape
        for b in read_memory(compiled("microbatches"), CAPACITY).buffers
        if b.part == "activations" and b.shape[0] == LAYERS and len(b.shape) > 3
    ]
    rows = ROWS // 2 // 2
    elements = sorted(math.prod(shape) // (LAYERS * rows * LENGTH) for shape in stacks)
    assert elements == [64, 4 * 24], "the blocks' inputs and attention's results, of a microbatch"


def test_gradients_have_the_name_and_shape_of_their_parameter(compiled):
    memory = read_memory(compiled("microbatches"), CAPACITY)
    gradients = [b for b in memory.buffers if b.part == "gradients"]
    assert {"stack.layers.mlp.down", "embed"} <= {b.module for b in gradients}
    down = next(b for b in gradients if b.module == "stack.layers.mlp.down")
    assert down.logical_shape == (LAYERS, 160, 64)


def test_logits_that_are_not_chunked_are_found(tmp_path, monkeypatch):
    def plain_loss(precision, hidden, head, targets, weights, z_loss, label_smoothing):
        logits = precision.einsum(head.spec, hidden, head.weights, out_dtype="float32")
        return logits_loss(logits, targets, weights, z_loss)

    monkeypatch.setattr("llm_jax.nn.losses.head_loss", plain_loss)
    step = compile_step(tmp_path, {"data": 1}, 1, remat="full", vocab_size=3000)
    memory = read_memory(step, CAPACITY)
    whole = ROWS * LENGTH * 3000 * 4
    assert memory.parts["logits"] >= whole
    largest = next(b for b in memory.buffers if b.part == "logits")
    assert largest.bytes == whole == memory.buffers[0].bytes
    assert largest.module == "loss"
    assert largest.source


def test_a_layer_as_wide_as_the_vocabulary_has_no_logits(tmp_path):
    step = compile_step(tmp_path, {"data": 1}, 1, mlp_dim=VOCABULARY)
    buffers = read_memory(step, CAPACITY).buffers
    assert any(VOCABULARY in b.shape and b.part == "activations" for b in buffers)
    assert {b.module for b in buffers if b.part == "logits"} <= {"loss", "head"}


def test_a_chip_of_two_devices_counts_both(compiled):
    step = compiled("shares")
    one, two = read_memory(step, CAPACITY), read_memory(step, 2 * CAPACITY, 2)
    assert two.peak == 2 * one.peak
    assert two.parts == {part: 2 * size for part, size in one.parts.items()}
    assert two.buffers == one.buffers, "which are told per device"


def test_without_dumps_the_totals_remain(compiled):
    bare = dataclasses.replace(compiled("one"), buffer_assignment="", live_ranges="")
    memory = read_memory(bare, CAPACITY)
    assert memory.peak == own_total(bare) == sum(memory.parts.values())
    arguments = [a.bytes for a in bare.arguments if a.kind == "parameter"]
    assert memory.parts["parameters"] == sum(arguments)
    assert memory.parts["temporaries"] > 0
    assert memory.at == ""


def test_a_step_that_does_not_fit_counts_what_the_compiler_needed(compiled):
    step = compiled("one")
    needed = read_memory(step, CAPACITY).peak + 512
    failed = OutOfMemory(needed, needed // 2, "RESOURCE_EXHAUSTED")
    memory = read_memory(dataclasses.replace(step, memory=None, out_of_memory=failed), CAPACITY)
    assert (memory.peak, memory.capacity, memory.fits) == (needed, needed // 2, False)
    assert sum(memory.parts.values()) == needed


ASSIGNMENT = """BufferAssignment:
allocation 0: size 400, parameter 0, shape |f32[100]| at ShapeIndex {}, maybe-live-out:
 value: <1 p.0 @0> (size=400,offset=0): f32[100]{0}
 value: <2 new @0> (size=400,offset=0): f32[100]{0}
allocation 1: size 64, thread-local:
 value: <3 inner @0> (size=64,offset=0): f32[16]{0}
allocation 2: size 1000, color 1, page 0, preallocated-temp:
 value: <4 fast @1> (size=1000,offset=0): f32[250]{0:S(1)}
allocation 3: size 1000, page 0, preallocated-temp:
 value: <5 a @0> (size=400,offset=0): f32[100]{0:T(128)}
 value: <6 loop{0} (phi) @0> (size=400,offset=0): f32[100]{0:T(128)}
 value: <7 b @0> (size=200,offset=600): bf16[100]{0}
 value: <8 c @0> (size=600,offset=400): f32[10,15]{1,0}
allocation 4: size 3000, color 5, preallocated-temp:
 value: <9 far @5> (size=3000,offset=0): f32[750]{0:S(5)}
"""
RANGES = """HloLiveRange (max 9):
  InstructionSequence:
    0:p.0
    1:a
    2:b
    3:loop
    4:c
    5:new
  BufferLiveRange:
    a{}:1-3
    loop{0}:3-5
    b{}:2-3
    c{}:4-4
  Live ranges at 4 (peak):
    c{}: 600 bytes
"""


def test_arrays_at_one_address_count_once_and_holes_do_not():
    layout = parse_layout(ASSIGNMENT, RANGES)
    assert [a.kind for a in layout.allocations] == ["argument", "call", "heap"]
    assert layout.total == 1400, "neither other memories nor what lies in other allocations"
    assert layout.host == 3000
    assert layout.used() == [(1, 400), (2, 600), (4, 1000), (5, 400), (6, 0)]
    assert {v.name for v in layout.alive(3)} == {"a", "loop", "b"}
    assert layout.schedule[4] == "c"
    assert layout.allocations[2].values[3].shape == (10, 15)
    with pytest.raises(ValueError, match="no buffer assignment"):
        parse_layout("HloModule x", RANGES)
