"""Meshes over one slice and several, and one line that helps for each that cannot be."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny import model_section, random_batch, run_config

from llm_jax.core.config import ConfigError
from llm_jax.sharding.mesh import AXES, MeshConfig, SliceAxes, make_mesh, make_rules
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.program import build_program

EXPERTS = {"num_experts": 6, "mlp_dim": 32}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What mesh_utils asks a TPU device."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0


def slices(*shapes):
    """The chips of slices of these shapes, four to a host."""
    places = [
        (index, (x, y, z))
        for index, shape in enumerate(shapes)
        for z, y, x in np.ndindex(shape[::-1])
    ]
    return [Chip(i, index, i // 4, coords) for i, (index, coords) in enumerate(places)]


CUBE = (2, 2, 2)
ONE, TWO, FOUR = slices(CUBE), slices(CUBE, CUBE), slices(*[CUBE] * 4)


def larger(mesh):
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def refused(error, message, action):
    """The action raises this error, in one line that has `message`."""
    with pytest.raises(error, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def program(mesh, **sections):
    """The program of a tiny model on a mesh of the first fake devices."""
    run = run_config(mesh={"data": 1, **mesh}, **sections)
    count = math.prod(size for axis, size in mesh.items() if axis in AXES)
    return build_program(run, make_mesh(run.mesh, jax.devices()[:count]))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, {"data": 8}),
        ({"fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"fsdp": 2}, {"data": 4, "fsdp": 2}),
        ({"pipeline": -1, "context": 4}, {"pipeline": 2, "context": 4}),
        ({"data": 1, "expert": 8}, {"expert": 8}),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_an_axis_takes_the_devices_that_are_left(config, shape):
    mesh = make_mesh(MeshConfig(**config))
    assert larger(mesh) == shape
    assert mesh.axis_names == AXES
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 3}, "fsdp 3 does not divide over 8 devices.* nearest that works is fsdp=(2|4)"),
        ({"data": 1, "fsdp": 4}, "fsdp 4 does not divide over 8 .* nearest that works is fsdp=8"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, "data 2 x fsdp 2 x tensor 4 .* works is tensor=2"),
        ({"fsdp": -1, "tensor": 6}, "tensor 6 does not divide over 8 .* works is tensor=(4|8)"),
        ({"fsdp": 3, "tensor": 5}, "product divides 8, or -1 on one axis"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_sizes_that_do_not_multiply_to_the_devices(config, message):
    refused(ValueError, message, lambda: make_mesh(MeshConfig(**config)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": -1, "fsdp": -1}, r"mesh\.data and mesh\.fsdp are -1: only one axis"),
        ({"fsdp": -1, "tensor": -1}, r"mesh\.fsdp and mesh\.tensor are -1: only one axis"),
        ({"tensor": 0}, r"mesh\.tensor = 0: expected a positive size, or -1"),
        ({"expert": -2}, r"mesh\.expert = -2: expected a positive size, or -1"),
        ({"microbatches": 0}, r"mesh\.microbatches = 0: expected at least 1"),
        ({"pipeline_rounds": 0}, r"mesh\.pipeline_rounds = 0: expected at least 1"),
        ({"microbatches": 4}, r"mesh\.microbatches = 4 needs a pipeline: set mesh\.pipeline"),
        ({"pipeline_rounds": 2}, r"mesh\.pipeline_rounds = 2 needs a pipeline"),
        (
            {"dcn": {"data": -1, "fsdp": -1}},
            r"mesh\.dcn\.data and mesh\.dcn\.fsdp are -1: only one",
        ),
        ({"dcn": {"fsdp": 0}}, r"mesh\.dcn\.fsdp = 0: expected a positive size, or -1"),
        ({"rules": "seqence"}, "did you mean 'sequence'.*choices: default, sequence, zero1"),
        ({"tensors": 2}, r"mesh\.tensors: unknown key; did you mean 'tensor'"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_values_that_no_machine_can_serve(config, message):
    refused(ConfigError, message, lambda: run_config(mesh=config))


@pytest.mark.parametrize(
    ("mesh", "sections", "message"),
    [
        ({"tensor": 8}, {}, r"attention\.\w+: axis '(kv_)?heads' of size 4 .* tensor of size 8 .* is 4"),
        ({"tensor": 4}, {"model": {"num_kv_heads": 2}}, "'kv_heads' of size 2 .* tensor .* is 2"),
        ({"tensor": 4}, {"model": {"mlp_dim": 66}}, "'mlp' of size 66 .* tensor of size 4 .* is 3"),
        ({"tensor": 2}, {"model": {"vocab_size": 63}}, "'vocab' of size 63 .* tensor .* is 1"),
        (
            {"fsdp": 4, "context": 2},
            {"model": {"embed_dim": 36, "head_dim": 8}},
            "'embed' of size 36 .* fsdp x context of size 8 .* is 6",
        ),
        ({"pipeline": 4}, {"model": {"num_layers": 6}}, "'layers' of size 6 .* pipeline .* is 3"),
        ({"expert": 4}, {"model": {"experts": EXPERTS}}, "'experts' of size 6 .* expert .* is 3"),
        (
            {"context": 8},
            {"data": {"sequence_length": 24}},
            "sequence length 24 does not divide into 2 x 8 chunks over mesh context; .* is 32",
        ),
        ({"data": 2, "fsdp": 4}, {"train": {"batch_size": 12}}, "batch_size 12 .* data x fsdp of size 8"),
        (
            {"data": 4},
            {"train": {"batch_size": 8, "accumulate_steps": 4}},
            "batch_size 8 / accumulate_steps 4 = 2 rows .* data of size 4 .* is 2",
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)  # fmt: skip
def test_what_does_not_divide_is_named_before_anything_is_traced(mesh, sections, message):
    model = model_section(**sections.get("model", {}))
    refused(ConfigError, message, lambda: program(mesh, **{**sections, "model": model}))


@pytest.mark.parametrize(("kernel", "needs"), [("splash", "needs a TPU"), ("cudnn", "needs a GPU")])
def test_a_kernel_that_this_backend_lacks(kernel, needs):
    message = f"'{kernel}' {needs}, and this is 'cpu'; choices here: .*'reference' is the fastest"
    refused(ValueError, message, lambda: program({}, train={"attention_kernel": kernel}).lower())


def test_norms_in_shares_of_the_sequence_need_a_sequence_that_divides():
    refused(
        ValueError,
        "'residual_length' of size 30 .* tensor of size 4",
        lambda: program({"tensor": 4, "rules": "sequence"}, data={"sequence_length": 30}).lower(),
    )


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(fsdp=-1), TWO, {"data": 2, "fsdp": 8}),
        (MeshConfig(fsdp=-1, dcn=SliceAxes(data=-1)), FOUR, {"data": 4, "fsdp": 8}),
        (MeshConfig(fsdp=4, tensor=2, dcn=SliceAxes(fsdp=2)), TWO, {"fsdp": 8, "tensor": 2}),
        (
            MeshConfig(fsdp=-1, tensor=2, dcn=SliceAxes(pipeline=2, data=2)),
            FOUR,
            {"pipeline": 2, "data": 2, "fsdp": 4, "tensor": 2},
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_only_dcn_axes_cross_slices(config, devices, shape):
    mesh = make_mesh(config, devices)
    assert larger(mesh) == shape
    assert set(mesh.devices.flat) == set(devices)
    number = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    across = config.slices(len({chip.slice_index for chip in devices}))
    for at, axis in enumerate(AXES):
        # Walking along an axis meets as many slices as its factor says, in equal runs.
        lines = np.moveaxis(number, at, -1).reshape(-1, number.shape[at])
        changes = (lines[:, 1:] != lines[:, :-1]).sum(-1)
        assert set(changes.tolist()) == {across[axis] - 1}, axis


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(fsdp=-1, dcn=SliceAxes(data=3)), TWO, "dcn data 3 .* over 2 slices: .*data=2"),
        (MeshConfig(fsdp=-1, dcn=SliceAxes(data=2)), FOUR, "dcn data 2 .* over 4 slices: .*data=4"),
        (MeshConfig(fsdp=-1, dcn=SliceAxes(data=2)), ONE, "dcn data 2 .* over 1 slice: .*data=1"),
        (
            MeshConfig(fsdp=16),
            TWO,
            "fsdp 16 does not divide over 8 devices of each of 2 slices: .* is fsdp=8",
        ),
        (
            MeshConfig(fsdp=-1),
            slices(CUBE, (2, 2, 1)),
            r"unequal size \(8, 4 devices\): .* start 2 slices of 4",
        ),
        (
            MeshConfig(fsdp=-1, dcn=SliceAxes(data=-1)),
            slices(CUBE, CUBE, (2, 2, 1)),
            r"unequal size \(8, 8, 4 devices\): .* start 3 slices of 4",
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_slices_that_the_mesh_does_not_fit(config, devices, message):
    refused(ValueError, message, lambda: make_mesh(config, devices))


def rules_of(**sizes):
    config = MeshConfig(**{"data": 1, **sizes})
    return make_rules(config, make_mesh(config, jax.devices()[: math.prod(sizes.values())]))


@pytest.mark.parametrize("shares", [1, 2, 4, 8])
def test_each_share_of_the_sequence_has_the_same_causal_work(shares):
    length = 64
    order = rules_of(context=shares).length_order(length)
    assert sorted(order.tolist()) == list(range(length))
    work = (order + 1).reshape(shares, -1).sum(-1)  # a query at place i sees i + 1 keys
    assert set(work.tolist()) == {length * (length + 1) // 2 // shares}


@pytest.mark.parametrize(
    "sizes",
    [{"context": 4}, {"context": 2, "data": 2}, {"context": 2, "fsdp": 2, "tensor": 2}],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
def test_tokens_travel_with_their_places(sizes):
    rules, batch = rules_of(**sizes), random_batch(8, 32)
    placed = to_global_batch(batch, rules, 8)
    back = np.argsort(rules.length_order(32))
    for name, rows in batch.items():
        array = placed[name]
        np.testing.assert_array_equal(np.asarray(array)[:, back], rows)
        rows_each = 8 // (sizes.get("data", 1) * sizes.get("fsdp", 1))
        shape = (rows_each, 32 // sizes["context"])
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}


def test_a_sequence_of_odd_chunks_is_refused():
    rules = rules_of(context=4)
    refused(ValueError, "length 36 .* 2 x 4 chunks .* is (32|40)", lambda: rules.length_order(36))
