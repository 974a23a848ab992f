"""TPU slices that are not there: their devices, for compiling, and the facts of their chips.

libtpu compiles for any slice on any machine. What a slice can do depends on its links: a dimension
that wraps around is a ring, and without rings the compiler sends weights by other ways. So the wrap
follows the hardware: on 3D generations a slice made of whole 4x4x4 cubes is a torus and a smaller one
has open ends; on v5e and v6e only a dimension of 16 chips closes.

Sources: Google Cloud's TPU pages (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x) for memory,
peak, links and slice shapes.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.core.config import ConfigError, nearest
from llm_jax.sharding import mesh as sharding_mesh
from llm_jax.sharding.mesh import MeshConfig

Shape = tuple[int, int, int]
Wrap = tuple[bool, bool, bool]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Rates and sizes are per chip, of which jax may see two devices.

    hbm_bytes: what a program can allocate. clock_hz: peak over the FLOPs of one cycle (matrix arrays of
    128 x 128: 4 on v5e, 8 on v5p; of 256 x 256: 4 on v6e, 8 on tpu7x); turns the compiler's cycles
    into seconds. link_bytes_per_second: one direction of one link between neighbours: the published
    bidirectional bandwidth of a chip over its links over 2. dimensions: of the torus.
    largest: chips in the largest slice.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    hbm_bytes_per_second: float
    clock_hz: float
    devices: int
    dimensions: int
    link_bytes_per_second: float
    largest: int
    chip_config_name: str


_GIB = 2**30
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * _GIB, 197e12, 0.81e12, 1.5e9, 1, 2, 50e9, 256, "default"),
        Chip("v5p", 95 * _GIB, 459e12, 2.765e12, 1.75e9, 1, 3, 100e9, 6144, "megacore"),
        Chip("v6e", 32 * _GIB, 918e12, 1.64e12, 1.75e9, 1, 2, 100e9, 256, "default"),
        Chip("tpu7x", 192 * _GIB, 2307e12, 7.38e12, 2.2e9, 2, 3, 100e9, 9216, "default"),
    )
}

# What libtpu asks a TPU host's metadata server for; there is none, and it would wait for it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices. shape: chips of a slice along x, y, z; devices: of all slices."""

    name: str
    chip: Chip
    shape: Shape
    num_slices: int
    wrap: Wrap
    devices: tuple[jax.Device, ...] = dataclasses.field(repr=False)

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.shape)


def topology(name: str) -> Topology:
    """The slices of a name; libtpu is loaded, no TPU is needed.

    Args:
      name: `v5p-128`, generation and number of CHIPS (Google's own names count cores on v5p), or a
        shape of chips, `v5p:4x4x8`; `2xv5p:4x4x8` for two such slices. More chips than the largest
        slice has are several of the largest: `v6e-512` is `2xv6e-256`. `/torus` or `/mesh` at the
        end closes all dimensions to rings or none, whatever the hardware does.

    Raises:
      ConfigError: no such generation or slice; names the nearest. Or libtpu is not installed.
    """
    slices_name, _, links = name.partition("/")
    if links not in ("", "torus", "mesh"):
        raise ConfigError(f"topology {name!r}: {links!r} after / must be torus or mesh")
    chip, shape, num_slices = parse_name(slices_name)
    wrap = wrap_of(chip, shape)
    if links:
        wrap = tuple(links == "torus" and axis < chip.dimensions for axis in range(3))
    dimensions = shape[: chip.dimensions]
    options = {
        "chip_config_name": chip.chip_config_name,
        "chips_per_host_bounds": tuple(min(a, b) for a, b in zip(shape, (2, 2, 1), strict=True)),
        "wrap": wrap,
    }
    if num_slices > 1:
        options["num_slices"] = num_slices
    devices = _devices(f"{chip.name}:{'x'.join(map(str, dimensions))}", options)
    return Topology(name, chip, shape, num_slices, wrap, devices)


def make_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    """The mesh that training makes on these slices.

    Raises:
      ValueError: the config's sizes do not multiply to the devices.
    """
    return sharding_mesh.make_mesh(config, topology.devices)


def libtpu_version() -> str:
    """Of the installed libtpu, which is the compiler.

    Raises:
      ConfigError: there is none; names the extra.
    """
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            'compiling for TPUs needs libtpu, on any machine: pip install "llm_jax[tpu]"'
        ) from None


def parse_name(name: str) -> tuple[Chip, Shape, int]:
    """Generation, shape of a slice in chips, slices.

    Raises:
      ConfigError: names the value and the nearest that works.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    if not found or found[1] == "0":
        raise ConfigError(
            f"topology {name!r}: expected generation and chips, v5p-128, a shape, v5p:4x4x8, or "
            "slices, 2xv6e-256"
        )
    slices, generation, chips, dimensions = found.groups()
    if generation not in CHIPS:
        raise ConfigError(
            f"topology {name!r}: unknown generation {generation!r}"
            f"{nearest(generation, CHIPS)}; choices: {', '.join(CHIPS)}"
        )
    chip, slices = CHIPS[generation], int(slices or 1)
    if chips is None:
        return chip, _checked_shape(chip, dimensions, name), slices
    shape, more = _shape_of(chip, int(chips), name)
    return chip, shape, slices * more


def wrap_of(chip: Chip, shape: Shape) -> Wrap:
    """Which dimensions of a slice close to a ring."""
    if chip.dimensions == 2:
        return shape[0] == 16, shape[1] == 16, False
    return (all(size % 4 == 0 for size in shape),) * 3


@functools.cache
def shapes(chip: Chip) -> tuple[Shape, ...]:
    """The slices of a generation, small ones first, the most compact of equal size first."""
    if chip.dimensions == 2:
        pairs = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
        return tuple((x, y, 1) for x, y in pairs)
    small = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = range(4, chip.largest // 16 + 1, 4)
    cubes = [
        (x, y, z)
        for x in sides
        for y in range(x, chip.largest // x // x + 1, 4)
        for z in range(y, chip.largest // x // y + 1, 4)
    ]
    return tuple(small + sorted(cubes, key=lambda shape: (math.prod(shape), sum(shape))))


def _shape_of(chip: Chip, chips: int, name: str) -> tuple[Shape, int]:
    """The most compact slice of so many chips, and how many of them."""
    by_size = {math.prod(shape): shape for shape in reversed(shapes(chip))}
    if chips in by_size:
        return by_size[chips], 1
    largest = shapes(chip)[-1]
    slices, rest = divmod(chips, math.prod(largest))
    if slices and not rest:
        return largest, slices
    best = min(by_size, key=lambda size: abs(size - chips))
    raise ConfigError(
        f"topology {name!r}: {chip.name} has no slice of {chips} chips; the nearest is "
        f"{chip.name}-{best}, and slices of {math.prod(largest)} can be joined"
    )


def _checked_shape(chip: Chip, dimensions: str, name: str) -> Shape:
    sizes = tuple(int(size) for size in dimensions.split("x"))
    if len(sizes) == chip.dimensions and (*sizes, 1)[:3] in shapes(chip):
        return (*sizes, 1)[:3]
    wanted = (*sorted(sizes), 1, 1)[:3]
    distance = lambda shape: sum(abs(a - b) for a, b in zip(shape, wanted, strict=True))  # noqa: E731
    best = min(shapes(chip), key=distance)
    raise ConfigError(
        f"topology {name!r}: {chip.name} has no slice of this shape; the nearest is "
        f"{chip.name}:{'x'.join(map(str, best[: chip.dimensions]))}"
    )


def _devices(name: str, options: Mapping[str, Any]) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    libtpu_version()
    return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
