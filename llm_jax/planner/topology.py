"""TPU slices that are not there: their devices, for compiling, and the facts of their chips.

libtpu compiles for any slice on any machine. What a slice can do depends on its links: a dimension
that wraps around is a ring, and without rings the compiler sends weights by other ways. So the wrap
follows the hardware: on 3D generations a slice made of whole 4x4x4 cubes is a torus and a smaller one
has open ends; on v5e and v6e only a dimension of 16 chips closes.

Sources: Google Cloud's TPU pages (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x) for memory,
peak, links and slice shapes.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from llm_jax.core.config import ConfigError
from llm_jax.planner.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from llm_jax.sharding.mesh import MeshConfig

# As Google Cloud and libtpu call them elsewhere.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x"}
MOST_CHIPS = 2**17

Shape = tuple[int, int, int]
Wrap = tuple[bool, bool, bool]


# What libtpu asks a TPU host's metadata server for; there is none, and it would wait for it. Several
# processes may compile at once, and none needs a log file.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """One or more equal slices. shape: chips of a slice along x, y, z."""

    name: str
    chip: Chip
    shape: Shape
    num_slices: int
    wrap: Wrap

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Topology(Slices):
    """devices: of all slices."""

    devices: "tuple[jax.Device, ...]" = dataclasses.field(repr=False)


def topology(name: str) -> Topology:
    """The slices of a name, as `parse_slices` reads it; libtpu is loaded, no TPU is needed.

    Raises:
      ConfigError: no such generation or slice; names the nearest. Or libtpu is not installed.
    """
    slices = parse_slices(name)
    chip, shape = slices.chip, slices.shape
    options = {
        "chip_config_name": chip.chip_config_name,
        "chips_per_host_bounds": tuple(min(a, b) for a, b in zip(shape, (2, 2, 1), strict=True)),
        "wrap": slices.wrap,
    }
    if slices.num_slices > 1:
        options["num_slices"] = slices.num_slices
    devices = _devices(f"{chip.name}:{'x'.join(map(str, shape[: chip.dimensions]))}", options)
    return Topology(**vars(slices), devices=devices)


def make_mesh(config: "MeshConfig", topology: Topology) -> "Mesh":
    """The mesh that training makes on these slices.

    Raises:
      ValueError: the config's sizes do not multiply to the devices.
    """
    from llm_jax.sharding.mesh import make_mesh

    return make_mesh(config, topology.devices)


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


@dataclasses.dataclass(frozen=True)
class Target:
    """What a plan is for. num_slices: of a TPU, or hosts of GPUs.

    Of "local" nothing is known before jax has started: chip None, no chips. CompiledStep knows.
    """

    name: str
    kind: Literal["tpu", "gpu", "local"]
    chip: Chip | None
    num_chips: int
    num_slices: int

    @property
    def devices_per_chip(self) -> int:
        return 1 if self.chip is None else self.chip.devices


def parse_target(name: str) -> Target:
    """What a plan can be for; neither jax nor libtpu is loaded.

    Args:
      name: slices of TPUs as `parse_slices` takes them; `local`, the devices of this machine;
        `h100-8` for a host of eight GPUs, `2xh100-8` for two, of which `h100-16` is another name.

    Raises:
      ConfigError: nothing of that name; lists the known ones, the nearest first.
    """
    if name == "local":
        return Target(name, "local", None, 0, 1)
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+))?", name)
    chip = CHIPS.get(found[2]) if found else None
    if chip is None or chip.kind != "gpu":
        slices = parse_slices(name)
        return Target(name, "tpu", slices.chip, slices.num_chips, slices.num_slices)
    hosts, gpus = int(found[1] or 1), int(found[3] or 0)
    more, rest = divmod(gpus, chip.largest)
    if hosts < 1 or gpus < 1 or (more and rest):
        whole = max(1, round(gpus / chip.largest)) * chip.largest
        raise ConfigError(
            f"topology {name!r}: expected GPUs of a host, 1 to {chip.largest}, or whole hosts; "
            f"the nearest is {chip.name}-{whole}"
        )
    _check_size(name, hosts * gpus)
    return Target(name, "gpu", chip, hosts * gpus, hosts * max(1, more))


def parse_slices(name: str) -> Slices:
    """What a name of slices means, without libtpu.

    Args:
      name: `v5p-128`, generation and number of CHIPS (Google's own names count cores on v5p), or a
        shape of chips, `v5p:4x4x8`; `2xv5p:4x4x8` for two such slices. More chips than the largest
        slice has are several of the largest: `v6e-512` is `2xv6e-256`. `/torus` or `/mesh` at the
        end closes all dimensions to rings or none, whatever the hardware does.

    Raises:
      ConfigError: no such generation or slice; names the nearest.
    """
    slices_name, _, links = name.partition("/")
    if links not in ("", "torus", "mesh"):
        raise ConfigError(f"topology {name!r}: {links!r} after / must be torus or mesh")
    chip, shape, num_slices = parse_name(slices_name)
    wrap = wrap_of(chip, shape)
    if links:
        wrap = tuple(links == "torus" and axis < chip.dimensions for axis in range(3))
    return Slices(name, chip, shape, num_slices, wrap)


def _by_likeness(word: str) -> list[str]:
    """The known names; one that begins alike, as generations of one maker do, comes before another."""
    word = word.lower()

    def likeness(known):
        return difflib.SequenceMatcher(None, word, known).ratio() + 0.3 * (word[:1] == known[0])

    return sorted((*CHIPS, "local"), key=likeness, reverse=True)


def parse_name(name: str) -> tuple[Chip, Shape, int]:
    """Generation, shape of a slice in chips, slices.

    Raises:
      ConfigError: names the value and the nearest that works.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    if not found or found[1] == "0":
        raise ConfigError(
            f"topology {name!r}: expected generation and chips, v5p-128, a shape, v5p:4x4x8, "
            "slices, 2xv6e-256, GPUs of a host, h100-8, or local; known, nearest first: "
            f"{', '.join(_by_likeness(name))}"
        )
    slices, generation, chips, dimensions = found.groups()
    chip = CHIPS.get(ALIASES.get(generation, generation))
    if chip is None:
        known = _by_likeness(generation)
        raise ConfigError(
            f"topology {name!r}: unknown generation {generation!r}, did you mean {known[0]!r}? "
            f"known, nearest first: {', '.join(known)}"
        )
    if chip.kind != "tpu":
        raise ConfigError(
            f"topology {name!r}: {generation} is no TPU; expected {chip.name}-{chip.largest}"
        )
    slices = int(slices or 1)
    if chips is None:
        shape = _checked_shape(chip, dimensions, name)
    else:
        shape, more = _shape_of(chip, int(chips), name)
        slices *= more
    _check_size(name, slices * math.prod(shape))
    return chip, shape, slices


def _check_size(name: str, chips: int) -> None:
    if chips > MOST_CHIPS:
        raise ConfigError(f"topology {name!r}: {chips:,} chips; at most {MOST_CHIPS:,}")


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
    wanted = (*sorted(max(size, 1) for size in sizes), 1, 1)[:3]
    distance = lambda shape: sum(  # noqa: E731
        abs(math.log(a / b)) for a, b in zip(shape, wanted, strict=True)
    )
    best = min(shapes(chip), key=distance)
    raise ConfigError(
        f"topology {name!r}: {chip.name} has no slice of this shape; the nearest is "
        f"{chip.name}:{'x'.join(map(str, best[: chip.dimensions]))}"
    )


def _devices(name: str, options: Mapping[str, Any]) -> "tuple[jax.Device, ...]":
    from jax.experimental import topologies

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    libtpu_version()
    return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
