"""The device mesh: named axes over the devices of all processes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm_jax.sharding.rules import RULE_SETS, AxisRules, PipelineSchedule

# From the axis that talks least to the one that talks most: the last ones get the nearest devices.
AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class SliceAxes:
    """How often each mesh axis crosses slices of a TPU; -1, at most once, takes all of them.

    The links between slices are slow: data first, then pipeline or fsdp.
    """

    pipeline: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        _check_sizes(dataclasses.asdict(self), "mesh.dcn.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; -1, at most once, takes the devices that are left.

    pipeline: groups of layers, one after the other.
    data:     copies of the parameters, each on its share of the batch.
    fsdp:     parameters, gradients and optimizer state in shares, each device also on its share of
              the batch (ZeRO stage 3).
    expert:   the experts of a mixture in shares; outside the mixture, more fsdp.
    context:  shares of the sequence.
    tensor:   heads, MLP and vocabulary in shares (Megatron), for fast links.
    dcn:      with several slices, the sizes above are those within one slice, and these multiply
              them across slices.
    rules:    which logical axis goes to which mesh axis: a name in sharding/rules.RULE_SETS.
    microbatches: pieces of the batch that follow each other through the pipeline; None: up to 4 x
              pipeline.
    pipeline_rounds: times a microbatch passes through all stages, each time through fewer layers.
              The share of time stages wait is (P - 1) / (rounds * microbatches + P - 1).
    """

    pipeline: int = 1
    data: int | None = None  # 1 where another axis fills, else -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    dcn: SliceAxes = dataclasses.field(default_factory=SliceAxes)
    rules: Literal["default", "sequence", "zero1"] = "default"
    microbatches: int | None = None
    pipeline_rounds: int = 1

    def __post_init__(self):
        if self.data is None:
            fills = -1 in (getattr(self, axis) for axis in AXES if axis != "data")
            object.__setattr__(self, "data", 1 if fills else -1)
        _check_sizes({axis: getattr(self, axis) for axis in AXES}, "mesh.")
        for field, default in (("microbatches", None), ("pipeline_rounds", 1)):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"mesh.{field} = {value}: expected at least 1")
            if value != default and self.pipeline == self.dcn.pipeline == 1:
                raise ValueError(f"mesh.{field} = {value} needs a pipeline: set mesh.pipeline too")

    def shape(self, num_devices: int, num_slices: int = 1) -> dict[str, int]:
        """Axis sizes within a slice of this many devices, in the order of AXES.

        Raises:
          ValueError: the sizes do not multiply to the devices.
        """
        within = {axis: getattr(self, axis) for axis in AXES}
        things = "devices" if num_slices == 1 else f"devices of each of {num_slices} slices"
        return _fill(within, num_devices // num_slices, "mesh", things)

    def slices(self, num_slices: int) -> dict[str, int]:
        """Factor of each axis across slices.

        Raises:
          ValueError: the factors do not multiply to the slices.
        """
        across = dataclasses.asdict(self.dcn)
        if num_slices > 1 and set(across.values()) == {1}:
            across["data"] = num_slices  # nothing said: copies of the model, the least to send
        return _fill(across, num_slices, "mesh.dcn", "slices" if num_slices > 1 else "slice")


def _check_sizes(sizes: Mapping[str, int], prefix: str) -> None:
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"{prefix}{axis} = {size}: expected a positive size, or -1 to fill")
    filled = [axis for axis, size in sizes.items() if size == -1]
    if len(filled) > 1:
        names = " and ".join(prefix + axis for axis in filled)
        raise ValueError(
            f"{names} are -1: only one axis can take what is left; give the others a size"
        )


def _fill(sizes: Mapping[str, int], count: int, what: str, things: str) -> dict[str, int]:
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filling = next((axis for axis, size in sizes.items() if size == -1), None)
    if filling is not None and count % fixed == 0:
        return {**sizes, filling: count // fixed}
    if filling is None and fixed == count:
        return dict(sizes)
    product = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1))
    product = product or "of one device"
    raise ValueError(
        f"{what} {product} does not divide over {count} {things}: {_nearest(sizes, count)}"
    )


def _nearest(sizes: Mapping[str, int], count: int) -> str:
    """The smallest change of one axis, if possible of one that was asked for, that makes the product fit."""
    fills = -1 in sizes.values()
    options = []
    for axis, size in sizes.items():
        rest = math.prod(s for a, s in sizes.items() if a != axis and s != -1)
        if size == -1 or count % rest:
            continue
        left = count // rest
        fits = [n for n in range(1, left + 1) if left % n == 0] if fills else [left]
        change = lambda n, size=size: (size == 1, abs(math.log(n / size)), -size)  # noqa: E731
        options += [(change(n), axis, n) for n in fits if n != size]
    if not options:
        return f"choose sizes whose product divides {count}, or -1 on one axis"
    _, axis, size = min(options)
    return f"the nearest that works is {axis}={size}"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all devices of all processes.

    Raises:
      ValueError: the config's sizes do not multiply to the devices, or slices of unequal size.
    """
    devices = jax.devices() if devices is None else devices
    count = _count_slices(devices)
    within, across = config.shape(len(devices), count), config.slices(count)
    shape = tuple(within.values())
    if count == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape,
            tuple(across[axis] for axis in AXES),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _count_slices(devices: Sequence[jax.Device]) -> int:
    """TPU slices. GPU hosts are no slices: the order of AXES keeps the last axes within a host."""
    indices = [getattr(device, "slice_index", None) for device in devices]
    if None in indices or devices[0].platform == "gpu":
        return 1
    sizes = np.unique(np.array(indices), return_counts=True)[1]
    if len(set(sizes.tolist())) > 1:
        raise ValueError(
            f"slices of unequal size ({', '.join(map(str, sizes))} devices): a mesh needs equal "
            f"slices; leave devices out, or start {len(sizes)} slices of {min(sizes)}"
        )
    return len(sizes)


def make_rules(config: MeshConfig, mesh: Mesh) -> AxisRules:
    """The rules of this config on its mesh."""
    schedule = PipelineSchedule(config.microbatches, config.pipeline_rounds)
    return AxisRules(mesh, tuple(RULE_SETS[config.rules].items()), schedule)
