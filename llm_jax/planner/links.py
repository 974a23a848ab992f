"""How long a collective takes on the links that its mesh axes run over.

A chip of a torus has two links per dimension, the chip at the end of an open line one. In an
all-gather of B bytes over N chips each chip must receive B (N-1)/N, and it can at no more than the
rate of the links into it. Algorithms that send parts ("colours") around all dimensions at once in
rotated order reach that: time = B (N-1)/N / (links x rate). On an open line the chip at the end has
one link, and no other link carries more, so a dimension counts 2 links as a ring and 1 as a line. Where
an axis takes every k-th chip of a dimension, its k groups share the links between: each has 1/k of them. A
reduce-scatter is the same backwards, an all-reduce both. libtpu says which algorithm it takes:
"3DAllGather" goes around three dimensions, "colors:2" are two, of one direction each where it says
so; fewer than there are links leave the others idle.

An all-to-all of B bytes per chip is bounded by the cut through the middle of the longest dimension,
n: half of the chips send half of their bytes to the other half over 2 links per row (1 on a line):
n B / 8 or n B / 4 over the rate, k times that for k groups. A permute by k places loads each link k times.

GPUs of a host hang on a switch by one port each: one link that reaches every other in one hop.

Two devices of one chip share its links; where they are in different groups, both groups' bytes
cross them. Between slices and hosts a collective is two-level: within a slice over links, and each
chip's share over the network.

Every hop adds about a microsecond (Austin et al., How to Scale Your Model, 2025,
jax-ml.github.io/scaling-book, "Sharded matrices"); a message of the network is assumed to add ten.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from llm_jax.planner.chips import CORE_LINKS, Chip
from llm_jax.planner.compiled import MeshAxis, Span
from llm_jax.planner.hlo_collectives import PERMUTE, Collective

HOP_SECONDS = 1e-6
NETWORK_SECONDS = 10e-6
_ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What one group of a collective runs over.

    axes: the mesh axes, "fsdp" or "fsdp+expert", "none" for a group of one. spans: of these axes,
    as far as the group covers them. distance: places that a permute moves by along its axis.
    """

    axes: str
    spans: tuple[Span, ...]
    distance: int = 1

    def size(self, kind: str) -> int:
        return math.prod(span.size for span in self.spans if span.kind == kind)


def axes_of(collective: Collective, mesh: Sequence[MeshAxis]) -> str:
    """The mesh axes that a collective runs over, "fsdp+expert"."""
    return crossing(collective, mesh).axes


def crossing(collective: Collective, mesh: Sequence[MeshAxis]) -> Crossing:
    """The links of a collective, from its devices and the order of the mesh's devices."""
    if collective.groups is None:
        axes = [axis for axis in mesh if any(span.kind == "network" for span in axis.spans)]
        spans = tuple(s for axis in axes for s in axis.spans if s.kind == "network")
        return Crossing(_joined(axes), spans)
    sizes = [axis.size for axis in mesh]
    if not collective.groups.size or collective.groups.max() >= math.prod(sizes):
        return Crossing("none", ())
    if collective.kind == PERMUTE:
        return _permuted(collective.groups, mesh, sizes)
    places = np.array(np.unravel_index(collective.groups[0], sizes))
    covered = [(axis, np.unique(row)) for axis, row in zip(mesh, places, strict=True)]
    covered = [(axis, row) for axis, row in covered if len(row) > 1]
    spans = [_part(axis, len(row), int(np.diff(row).min())) for axis, row in covered]
    joined = _joined([axis for axis, _ in covered])
    return Crossing(joined, tuple(span for part in spans for span in part))


def _permuted(pairs: np.ndarray, mesh: Sequence[MeshAxis], sizes: Sequence[int]) -> Crossing:
    source, target = (np.array(np.unravel_index(pairs[:, end], sizes)) for end in (0, 1))
    steps = np.abs(target - source)
    moved = [index for index, row in enumerate(steps) if row.any()]
    # The way that most take; from the end of a line all the way back, on links nobody else uses.
    distances = [int(np.bincount(row[row > 0]).argmax()) for row in steps[moved]]
    axes = [mesh[index] for index in moved]
    distance = max(
        (min(d, axis.size - d) for d, axis in zip(distances, axes, strict=True)), default=1
    )
    return Crossing(_joined(axes), tuple(s for axis in axes for s in axis.spans), max(distance, 1))


def _joined(axes: Sequence[MeshAxis]) -> str:
    return "+".join(axis.name for axis in axes) or "none"


def _part(axis: MeshAxis, count: int, step: int) -> tuple[Span, ...]:
    """The spans of `count` places along an axis, every `step`-th; the innermost first to be used."""
    if count == axis.size:
        return axis.spans
    parts: list[Span] = []
    for span in reversed(axis.spans):
        skipped = math.gcd(span.size, step)
        size = math.gcd(span.size // skipped, count)
        if size > 1:
            ring = span.ring and size * skipped == span.size
            stride = span.stride * skipped
            parts.insert(0, dataclasses.replace(span, size=size, ring=ring, stride=stride))
        step, count = step // skipped, count // size
    return tuple(parts)


def seconds(collective: Collective, cross: Crossing, chip: Chip) -> float:
    """Of one run of a collective by itself; 0 where the chip's rates are unknown."""
    total = _link_seconds(collective, cross, chip)
    hosts = cross.size("network")
    if hosts > 1 and chip.network_bytes_per_second:
        # Within the slice the whole array goes over links; between slices each chip's share of it.
        share = 1 if collective.kind in (PERMUTE, *_ALL_TO_ALL) else cross.size("link")
        moved = _bytes_of_chip(collective, cross, chip) / share
        if collective.kind != PERMUTE:
            moved *= (hosts - 1) / hosts * _passes(collective.kind)
        total += moved / chip.network_bytes_per_second + NETWORK_SECONDS * _passes(collective.kind)
    return total


def _bytes_of_chip(collective: Collective, cross: Crossing, chip: Chip) -> float:
    """What the devices of a chip exchange with others, which is one array where they are in one group."""
    if collective.kind in _ALL_TO_ALL:  # each device sends its own
        return collective.bytes * chip.devices
    return collective.bytes * chip.devices / cross.size("core")


def _passes(kind: str) -> int:
    return 2 if kind == "all-reduce" else 1


def _link_seconds(collective: Collective, cross: Crossing, chip: Chip) -> float:
    spans = [span for span in cross.spans if span.kind == "link"]
    cores, rate = cross.size("core"), chip.link_bytes_per_second
    if not rate or (not spans and cores == 1):
        return 0.0
    if not spans:
        share = 1.0 if collective.kind == PERMUTE else (cores - 1) / cores
        return (
            collective.bytes * share * _passes(collective.kind) / (CORE_LINKS * rate) + HOP_SECONDS
        )
    moved = _bytes_of_chip(collective, cross, chip)
    chips, switched = math.prod(span.size for span in spans), chip.links == 1
    hops = sum((s.size // 2 if s.ring else s.size - 1) * s.stride for s in spans)
    latency = HOP_SECONDS * (1 if switched else hops)
    if collective.kind in (PERMUTE, "collective-broadcast"):
        distance = 1 if switched else cross.distance * spans[-1].stride
        return moved * distance / rate + HOP_SECONDS * distance
    if collective.kind in _ALL_TO_ALL and not switched:
        cut = max(span.size * span.stride / (8 if span.ring else 4) for span in spans)
        return moved * cut / rate + latency
    lanes = min(links_used(spans, collective.strategy), chip.links)
    return _passes(collective.kind) * (moved * (chips - 1) / chips / (lanes * rate) + latency)


def links_used(spans: Sequence[Span], strategy: str = "") -> float:
    """Links into a chip over which an all-gather or a reduction receives at the same time.

    Those that several groups share count as a part of one.

    strategy: the compiler's notes in `collective_algorithm_config` or `collective_offload_config`.
    """
    most = sum((2 if span.ring else 1) / span.stride for span in spans)
    offloaded = strategy.count('"phase_rings"')
    dimensions = re.search(r'"emitter":"(\d)DAllGather', strategy)
    colors = re.search(r"\b(\w+)\{colors:(\d+)", strategy)
    if offloaded:
        used = offloaded * (1 if "UNIDIR" in strategy else 2)
    elif dimensions:
        used = 2 * int(dimensions[1])
    elif colors:
        used = int(colors[2]) * (1 if "UniDirection" in colors[1] else 2)
    else:
        used = most
    return min(most, used)
