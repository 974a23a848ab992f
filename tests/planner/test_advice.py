"""What to change: the right key for each kind of array, valid, with the bytes that it saves."""

import dataclasses

import pytest

from llm_jax.core.config import to_dict
from llm_jax.planner.advice import advise
from llm_jax.planner.changes import changes_for
from llm_jax.planner.compiled import Argument, CompiledStep, MeshAxis
from llm_jax.planner.plan import LiveBuffer, Memory, Roofline
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
    shares = sizes["data"] * sizes.get("fsdp", 1) * sizes.get("expert", 1)
    rows = run.train.batch_size // shares
    arguments = (
        _argument("params.stack.layers.mlp.up", "parameter", (LAYERS, EMBED, WIDE)),
        Argument(
            "batch.tokens", "batch['tokens']", "batch", (run.train.batch_size, LENGTH), "int32",
            (("data",), ()), (rows, LENGTH), rows * LENGTH * 4,
        ),
    )  # fmt: skip
    return CompiledStep(
        target=target, config=to_dict(run),
        mesh=tuple(MeshAxis(name, sizes.get(name, 1), ()) for name in AXES),
        arguments=arguments, num_params=1, tokens_per_step=1, model_flops={}, seconds={},
        host_peak_bytes=0, versions={}, memory=None, out_of_memory=None, hlo="",
        buffer_assignment="", live_ranges="",
    )  # fmt: skip


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
        key, _, value = one.partition("=")
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        assert last in section, one
        section[last] = int(value) if value.lstrip("-").isdigit() else value
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


def test_every_change_is_a_valid_config():
    run = run_of(optimizer={"name": "adamw"})
    buffers = (INPUT, RESULT, HIDDEN, buffer("optimizer", UP, "o.mu.up", "f32", UP))
    changes = changes_for(step_of(run), buffers)
    assert {key for change in changes for key in change.keys} >= {
        "model.remat", "train.accumulate_steps", "mesh.fsdp", "optimizer.momentum_dtype"}  # fmt: skip
    for change in changes:
        applied(run, change.override)
        assert 0 < change.total <= sum(b.bytes for b in buffers)


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
