"""What mesh axes run over, from devices made up here: no compiler, no hardware."""

import dataclasses
import types

import numpy as np
import pytest

from llm_jax.planner.compiled import Span
from llm_jax.planner.layout import mesh_axes
from llm_jax.planner.placement import stand_ins
from llm_jax.planner.topology import parse_slices, parse_target
from llm_jax.sharding.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    platform: str = "tpu"
    process_index: int = 0
    coords: tuple[int, int, int] | None = None
    core_on_chip: int = 0
    slice_index: int | None = None


def torus(x, y, z, cores=1, slices=1):
    """Devices [slices, z, y, x, cores]."""
    places = [
        Device(0, coords=(i, j, k), core_on_chip=core, slice_index=number)
        for number in range(slices)
        for k in range(z)
        for j in range(y)
        for i in range(x)
        for core in range(cores)
    ]
    devices = [dataclasses.replace(place, id=i) for i, place in enumerate(places)]
    return np.array(devices, dtype=object).reshape(slices, z, y, x, cores)


def spans(devices, wrap=(False,) * 3, **sizes):
    """Of each axis, the spans on a mesh of these sizes."""
    names, shape = tuple(sizes), tuple(sizes.values())
    mesh = types.SimpleNamespace(devices=devices.reshape(shape), axis_names=names)
    found = mesh_axes(mesh, wrap)
    assert [axis.size for axis in found] == list(shape)
    return {axis.name: axis.spans for axis in found}


def test_a_cube_closes_where_an_axis_goes_all_around():
    cube, wrap = torus(4, 4, 4), (True, True, True)
    assert spans(cube, wrap, fsdp=16, tensor=4) == {
        "fsdp": (Span("link", 2, 4, True), Span("link", 1, 4, True)),
        "tensor": (Span("link", 0, 4, True),),
    }
    halves = spans(cube, wrap, data=1, fsdp=32, tensor=2)
    assert halves["data"] == ()
    assert halves["tensor"] == (Span("link", 0, 2, False),), "two neighbours of a ring of four"
    every_other = Span("link", 0, 2, True, stride=2)
    assert halves["fsdp"] == (Span("link", 2, 4, True), Span("link", 1, 4, True), every_other)
    assert spans(cube, fsdp=64)["fsdp"] == tuple(Span("link", d, 4, False) for d in (2, 1, 0))


@pytest.mark.parametrize(
    ("name", "sizes", "axis", "expected"),
    [
        ("v5e:16x16", {"data": 2, "fsdp": 128}, "data", Span("link", 0, 2, True, 8)),
        ("v5e:16x16", {"pipeline": 4, "fsdp": 64}, "pipeline", Span("link", 0, 4, True, 4)),
        ("v5p:8x8x8", {"data": 2, "fsdp": 256}, "data", Span("link", 0, 2, True, 4)),
        ("v6e:4x4", {"data": 2, "fsdp": 8}, "data", Span("link", 0, 2, False, 2)),
    ],
)
def test_an_axis_that_takes_every_kth_chip_of_a_dimension(name, sizes, axis, expected):
    """As training's own make_mesh splits dimensions."""
    slices = parse_slices(name)
    mesh = make_mesh(MeshConfig(**sizes), stand_ins(parse_target(name)))
    (span,) = next(a for a in mesh_axes(mesh, slices.wrap) if a.name == axis).spans
    assert dataclasses.replace(span, dimension=0) == expected


def test_the_devices_of_a_chip_and_slices_are_told_apart():
    found = spans(torus(2, 2, 4, cores=2, slices=2), data=2, fsdp=16, tensor=2)
    assert found == {
        "data": (Span("network", 0, 2, False),),
        "fsdp": (Span("link", 2, 4, False), Span("link", 1, 2, False), Span("link", 0, 2, False)),
        "tensor": (Span("core", 0, 2, False),),
    }


def test_a_line_that_turns_corners_still_multiplies_to_its_size():
    corner = torus(4, 4, 1).reshape(-1)[[0, 1, 2, 3, 7, 11]]
    assert spans(corner, fsdp=6)["fsdp"] == (Span("link", 0, 6, False),)


@pytest.mark.parametrize(
    ("platform", "near"), [("gpu", Span("link", 0, 4, True)), ("cpu", Span("core", 0, 4, False))]
)
def test_hosts_of_devices_without_coordinates_are_joined_by_a_network(platform, near):
    # The numbers of a CPU's devices jump from process to process.
    devices = np.array(
        [Device(2048 * (i // 4) + i % 4, platform, process_index=i // 4) for i in range(8)]
    )
    network = Span("network", 0, 2, False)
    assert spans(devices, data=2, fsdp=4) == {"data": (network,), "fsdp": (near,)}
    assert spans(devices, fsdp=8)["fsdp"] == (network, near)


def test_hosts_that_an_axis_cuts_unevenly_still_cost_the_network():
    devices = np.array([Device(i, "gpu", process_index=i // 6) for i in range(12)])
    found = spans(devices, data=3, fsdp=4)
    network = Span("network", 0, 2, False)
    assert found == {
        "data": (network, Span("link", 0, 2, True)),
        "fsdp": (network, Span("link", 0, 2, True)),
    }
