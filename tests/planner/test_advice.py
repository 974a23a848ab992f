"""What to change: the right key for each kind of array, valid, with the bytes that it saves."""

import dataclasses
import math

import pytest

from llm_jax.core.config import set_override, to_dict
from llm_jax.planner.advice import advise
from llm_jax.planner.changes import changes_for
from llm_jax.planner.compiled import Argument, CompiledStep, MeshAxis
from llm_jax.planner.placement import place
from llm_jax.planner.plan import LiveBuffer, Memory, Roofline
from llm_jax.planner.topology import parse_target
from llm_jax.sharding.mesh import AXES
from llm_jax.training.config import RunConfig, resolve

LAYERS, EMBED, WIDE, LENGTH = 4, 64, 160, 128


def run_of(**sections) -> RunConfig:
    config = {
        "model": {
            "name": "gpt", "vocab_size": 500, "embed_dim": EMBED, "num_layers": LAYERS,
            "num_heads": 4, "head_dim": 24, "mlp_dim": WIDE, "max_length": LENGTH,
        },
        "data": {"sequence_length": LENGTH, "tokenizer": {"name": "raw_bytes"}},
        "mesh": {},
        "train": {"num_steps": 10, "batch_size": 64},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return resolve(config)


def step_of(run: RunConfig, sizes=None, target="v5p:2x2x1") -> CompiledStep:
    sizes = {"data": 4, **(sizes or {})}
    shares = math.prod(sizes.get(name, 1) for name in ("data", "fsdp", "expert", "pipeline"))
    rows, length = run.train.batch_size // shares, LENGTH // sizes.get("context", 1)
    arguments = (
        _argument("params.stack.layers.mlp.up", "parameter", (LAYERS, EMBED, WIDE)),
        Argument(
            "batch.tokens", "batch['tokens']", "batch", (run.train.batch_size, LENGTH), "int32",
            (("data",), ()), (rows, length), rows * length * 4,
        ),
    )  # fmt: skip
    return CompiledStep(
        target=target, config=to_dict(run),
        mesh=tuple(MeshAxis(name, sizes.get(name, 1), ()) for name in AXES),
        arguments=arguments, num_params=1, tokens_per_step=1, model_flops={}, seconds={},
        host_peak_bytes=0, versions={}, memory=None, out_of_memory=None, hlo="",
        buffer_assignment="", live_ranges="",
    )  # fmt: skip


def laid_out(run: RunConfig, target: str) -> CompiledStep:
    """The step on the mesh that training makes there."""
    placement = place(run, parse_target(target))
    step = step_of(run, {name: axis.size for name, axis in placement.axes.items()}, target)
    (kind, *_) = placement.target.chip.device_kinds
    return dataclasses.replace(step, mesh=tuple(placement.axes.values()), device_kind=kind)


def _argument(path, kind, shape):
    size = 4
    for n in shape:
        size *= n
    return Argument(path, path, kind, shape, "float32", ((),) * len(shape), shape, size)


def buffer(part, shape, module="stack.layers.mlp", dtype="bf16", logical=None) -> LiveBuffer:
    size = {"bf16": 2, "f32": 4}[dtype]
    for n in shape:
        size *= n
    return LiveBuffer(part, size, dtype, shape, logical, None, module, "", "", "x")


def memory_of(*buffers, capacity=2**40) -> Memory:
    buffers = tuple(sorted(buffers, key=lambda b: -b.bytes))
    parts = {}
    for one in buffers:
        parts[one.part] = parts.get(one.part, 0) + one.bytes
    parts.setdefault("parameters", 0)
    return Memory(capacity, sum(parts.values()), parts, buffers, ((0, 1),), "")


def applied(run: RunConfig, override: str) -> RunConfig:
    """The run with overrides, or the ConfigError that a user would see."""
    config = to_dict(run)
    for one in override.split():
        set_override(config, one)
    return resolve(config)


ROWS = 16
STACK = (LAYERS, ROWS, LENGTH)
INPUT = buffer("activations", (*STACK, EMBED), "stack.layers")
RESULT = buffer("activations", (*STACK, 4 * 24), "stack.layers.attention")
HIDDEN = buffer("activations", (*STACK, WIDE))
UP = (LAYERS, EMBED, WIDE)


@pytest.mark.parametrize(
    ("remat", "one", "change", "saves"),
    [
        ("none", HIDDEN, "model.remat=narrow", 1.0),
        ("attention", RESULT, "model.remat=full", 1.0),
        ("full", INPUT, "train.accumulate_steps=2", 0.5),
        ("none", INPUT, "train.accumulate_steps=2", 0.5),
    ],
)
def test_what_is_kept_is_dropped_by_the_next_policy_that_does(remat, one, change, saves):
    run = run_of(model={"remat": remat})
    memory, _ = advise(step_of(run), memory_of(one), None, 2**40)
    assert memory.buffers[0].change == change
    assert memory.buffers[0].saves == one.bytes * saves
    applied(run, change)


@pytest.mark.parametrize(
    ("one", "change"),
    [
        (buffer("logits", (ROWS, LENGTH, 500), "loss", "f32"), "train.accumulate_steps=2"),
        (buffer("temporaries", (ROWS, LENGTH, WIDE)), "train.accumulate_steps=2"),
        (buffer("parameters", UP, dtype="f32", logical=UP), "mesh.data=2 mesh.fsdp=2"),
        (buffer("gradients", UP, dtype="f32", logical=UP), "mesh.data=2 mesh.fsdp=2"),
        (buffer("optimizer", UP, "opt.mu.up", "f32", UP), "mesh.data=2 mesh.fsdp=2"),
        (buffer("collectives", (EMBED, WIDE), logical=UP), None),
        (buffer("temporaries", (EMBED, WIDE), logical=UP), None),
    ],
)
def test_each_part_has_its_key(one, change):
    run = run_of()
    memory, findings = advise(step_of(run), memory_of(one, HIDDEN), None, 2**40)
    found = next(b for b in memory.buffers if b.part == one.part and b.shape == one.shape)
    assert found.change == change
    assert findings == ()
    if change:
        assert found.saves == one.bytes // 2
        applied(run, change)


def test_host_memory_is_said():
    memory = dataclasses.replace(memory_of(HIDDEN), host=3 * 2**30)
    _, (finding,) = advise(step_of(run_of()), memory, None, 2**40)
    assert finding.kind == "note"
    assert finding.bytes == memory.host
    assert finding.text.startswith("3.00 GiB per chip")


def test_scores_want_another_kernel():
    run = run_of(train={"attention_kernel": "reference"})
    scores = buffer("attention", (ROWS, 4, LENGTH, LENGTH), "stack.layers.attention", "f32")
    memory, _ = advise(step_of(run), memory_of(scores), None, 2**40)
    assert memory.buffers[0].change == "train.attention_kernel=auto"
    assert memory.buffers[0].saves == scores.bytes


def test_in_shares_already_moments_take_fewer_bits():
    run = run_of(optimizer={"name": "adamw", "beta2": 0.95})
    nu = buffer("optimizer", UP, "opt_state.0.nu.up", "f32", UP)
    memory, _ = advise(step_of(run, {"data": 1, "fsdp": 4}), memory_of(nu), None, 2**40)
    assert memory.buffers[0].change == "optimizer.variance_dtype=bfloat16"
    applied(run, memory.buffers[0].change)
    slow = run_of(optimizer={"name": "adamw", "beta2": 0.999})
    memory, _ = advise(step_of(slow, {"data": 1, "fsdp": 4}), memory_of(nu), None, 2**40)
    assert memory.buffers[0].change is None, "a bfloat16 second moment needs a smaller beta2"


def test_a_head_in_shares_halves_its_gradient():
    run = run_of(mesh={"fsdp": -1})
    head = buffer("gradients", (EMBED, 500), "head", "f32", (EMBED, 500))
    step = step_of(run, {"data": 1, "fsdp": 4})
    step = dataclasses.replace(step, arguments=step.arguments[1:])
    memory, _ = advise(step, memory_of(head), None, 2**40)
    assert memory.buffers[0].change == "mesh.fsdp=2 mesh.tensor=2 train.accumulate_steps=2"
    assert memory.buffers[0].saves == head.bytes // 2
    applied(run, memory.buffers[0].change)


def test_one_row_is_shared_by_two_devices():
    run = run_of(mesh={"fsdp": -1}, train={"batch_size": 4}, model={"remat": "full"})
    one = buffer("activations", (LAYERS, 1, LENGTH, EMBED), "stack.layers")
    step = step_of(run, {"data": 1, "fsdp": 4})
    step = dataclasses.replace(step, arguments=step.arguments[1:])
    memory, _ = advise(step, memory_of(one), None, 2**40)
    change = "mesh.fsdp=2 mesh.context=2 train.accumulate_steps=2"
    assert (memory.buffers[0].change, memory.buffers[0].saves) == (change, one.bytes // 2)
    applied(run, change)


MESHES = {
    "one slice": ("v5e:4x4", {"data": 4, "fsdp": 4}),
    "slices are copies": ("2xv5e-16", {"data": 1, "fsdp": -1}),
    "copies within slices too": ("2xv5e-16", {"data": 4, "fsdp": -1}),
    "slices share": ("2xv5e-16", {"data": 4, "fsdp": -1, "dcn": {"fsdp": -1}}),
    "hosts are no slices": ("2xh100-8", {"data": 2, "fsdp": 8}),
    "pipeline": ("v5e:4x4", {"pipeline": 2, "fsdp": -1, "tensor": 2}),
    "pipeline, a row a piece": ("v5e:2x4", {"pipeline": 4, "fsdp": -1, "microbatches": 4}),
    "pipeline over slices": ("2xv5e-8", {"data": 2, "fsdp": -1, "dcn": {"pipeline": 2}}),
    "zero1": ("v5e:4x4", {"data": 4, "fsdp": -1, "rules": "zero1"}),
    "embed in other shares too": ("v5e:8x16", {"data": 8, "fsdp": 8, "context": 2}),
}


def buffers_of(step: CompiledStep) -> tuple[LiveBuffer, ...]:
    """Arrays of every kind that a change is made for."""
    sizes = {axis.name: axis.size for axis in step.mesh}
    rows, length = step.arguments[-1].shard_shape
    vocabulary = 512 // sizes["tensor"]
    state = [buffer(part, UP, f"{part}.mu.up", "f32", UP)
             for part in ("parameters", "gradients", "optimizer")]  # fmt: skip
    return (
        buffer("temporaries", (rows, length, WIDE)),
        buffer("activations", (LAYERS, rows, length, EMBED), "stack.layers"),
        buffer("gradients", (EMBED, vocabulary), "head", "f32", (EMBED, vocabulary)),
        *state,
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", MESHES)
def test_training_accepts_every_change(name, batch):
    """batch: rows of each device."""
    target, mesh = MESHES[name]
    devices = parse_target(target).num_chips
    if "microbatches" in mesh:
        mesh = {**mesh, "microbatches": batch * mesh["pipeline"]}
    run = run_of(mesh=mesh, train={"batch_size": batch * devices}, model={"vocab_size": 512},
                 optimizer={"name": "adamw"})  # fmt: skip
    step = laid_out(run, target)
    buffers = buffers_of(step)
    changes = changes_for(step, buffers)
    assert changes
    for change in changes:
        place(applied(run, change.override), parse_target(target))
        assert 0 < change.total <= sum(b.bytes for b in buffers)


def test_sizes_are_told_within_a_slice():
    told = {
        name: {c.override for c in changes_for(step, buffers_of(step)) if "mesh.data" in c.keys}
        for name, (target, mesh) in MESHES.items()
        for step in [laid_out(run_of(mesh=mesh, train={"batch_size": 128}), target)]
    }
    assert told["slices are copies"] == set(), "the copies are the slices themselves"
    assert told["copies within slices too"] == {
        "mesh.data=2 mesh.fsdp=8", "mesh.data=1 mesh.fsdp=16"}  # fmt: skip
    assert told["slices share"] == told["copies within slices too"]
    assert told["hosts are no slices"] == {"mesh.data=1 mesh.fsdp=16"}
    assert told["embed in other shares too"] == {
        "mesh.data=4 mesh.fsdp=16", "mesh.data=2 mesh.fsdp=32"}  # fmt: skip


def test_under_zero1_shares_are_of_the_optimizer_and_default_rules_of_the_weights():
    target, mesh = MESHES["zero1"]
    step = laid_out(run_of(mesh=mesh), target)
    experts = dataclasses.replace(
        buffer("parameters", (LAYERS, 2, EMBED, WIDE), "experts", "f32", (LAYERS, 4, EMBED, WIDE)),
        sharding="[-, expert, -, -]",
    )
    memory, _ = advise(step, memory_of(experts, *buffers_of(step)), None, 2**40)
    found = {(b.part, b.module): (b.change, b.saves) for b in memory.buffers if b.part != "batch"}
    size = LAYERS * EMBED * WIDE * 4
    for part in ("parameters", "gradients"):
        assert found[part, f"{part}.mu.up"] == ("mesh.rules=default", size - size // 4)
    assert found["optimizer", "optimizer.mu.up"] == ("mesh.data=2 mesh.fsdp=8", size // 2)
    assert found["parameters", "experts"] == ("mesh.rules=default", experts.bytes * 3 // 4)
    axes = {"data": 4, "fsdp": 2, "expert": 2}
    (change,) = (
        c for c in changes_for(step_of(run_of(mesh=mesh), axes), (experts,))
        if c.override == "mesh.rules=default"
    )  # fmt: skip
    assert change.saves == (experts.bytes // 2,), "its experts are in shares already"


def test_a_pipeline_keeps_what_all_its_turns_make():
    mesh = {"pipeline": 2, "fsdp": -1, "microbatches": 8}
    run = run_of(mesh=mesh, model={"remat": "attention"})
    step = laid_out(run, "v5e:2x2")
    rows, turns, layers = 64 // 2 // 8, 8 + 2 - 1, LAYERS // 2
    stack = (turns, layers, 1, 1, rows, LENGTH)
    one = buffer("activations", (*stack, EMBED), "stack.layers")
    result = buffer("activations", (*stack, 4, 24), "stack.layers.attention")
    between = buffer("activations", (1, 1, 8, rows, LENGTH, EMBED), "stack")
    saves = {c.override: c.saves for c in changes_for(step, (one, result, between))}
    assert saves["model.remat=full"] == (0, result.bytes, 0)
    assert "model.remat=offload" not in saves, "libtpu fails on it"
    assert saves["train.accumulate_steps=4"] == tuple(
        b.bytes * 3 // 4 for b in (one, result, between)
    )
    left = 5 / 9 / 4  # in turns and in rows of each
    assert saves["train.accumulate_steps=8 mesh.microbatches=4"] == (
        int(one.bytes * (1 - left)), int(result.bytes * (1 - left)), between.bytes * 7 // 8)  # fmt: skip


def test_a_first_sum_of_gradients_costs_its_memory():
    run = run_of(train={"accumulate_steps": 2})
    halves = {}
    for name, one in (("one", run_of()), ("two", run)):
        rows = ROWS if name == "one" else ROWS // 2
        buffers = (buffer("temporaries", (rows, LENGTH, WIDE)),)
        (change, *_) = changes_for(step_of(one), buffers)
        halves[name] = change
    assert halves["one"].costs == LAYERS * EMBED * WIDE * 4
    assert halves["two"].costs == 0
    assert halves["two"].override == "train.accumulate_steps=4"


def test_what_does_not_fit_names_the_smallest_change_that_would():
    run = run_of()
    memory = memory_of(INPUT, RESULT, HIDDEN)
    little, much = memory.peak - 1000, INPUT.bytes // 2
    _, (finding,) = advise(step_of(run), memory, None, little)
    assert finding.change == "train.accumulate_steps=2"
    assert finding.bytes == 1000
    assert finding.kind == "memory"
    assert "does not fit" in finding.text
    _, (finding,) = advise(step_of(run), memory, None, much)
    assert "train.accumulate_steps=8" in finding.change or "offload" in finding.change
    memory = memory_of(INPUT, buffer("collectives", (EMBED, WIDE), logical=UP))
    _, (finding,) = advise(step_of(run), memory, None, 1000)
    assert finding.change is None
    assert "times the chips" in finding.text


def test_two_changes_where_one_is_not_enough():
    run = run_of(mesh={"data": -1}, model={"remat": "full"}, train={"batch_size": 8})
    one = buffer("activations", (LAYERS, 2, LENGTH, EMBED), "stack.layers")
    state = buffer("parameters", (LAYERS, EMBED, 40), dtype="f32", logical=(LAYERS, EMBED, 40))
    memory = memory_of(one, state)
    step = step_of(run, target="local")
    step = dataclasses.replace(step, arguments=step.arguments[1:])
    capacity = one.bytes // 2 + state.bytes // 2 + memory.peak // 15
    _, (finding,) = advise(step, memory, None, capacity)
    assert finding.change == "mesh.data=2 mesh.fsdp=2 train.accumulate_steps=2"
    applied(run, finding.change)


def test_where_communication_takes_the_step_remat_comes_before_microbatches():
    run = run_of()
    memory = memory_of(INPUT, RESULT, HIDDEN)
    slow = Roofline(1.0, {"compute": 0.5, "communication fsdp": 0.5}, (), (), 1.0, None, 1.0,
                    None, None, 1.0, 1.0)  # fmt: skip
    _, (finding,) = advise(step_of(run), memory, slow, memory.peak - 1000)
    assert finding.change.startswith("model.remat=")
