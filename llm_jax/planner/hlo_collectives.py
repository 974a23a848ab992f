"""Collectives of an HLO text: where they hide, what they move, which devices take part.

They hide in fusions: a reduce-scatter is a fusion of an all-reduce and a slice, an asynchronous
collective runs inside the fusions of matrix products, once in each, with one `chain_id`. On TPU7x
they are calls to programs of the SparseCores (`call-start`), between slices transfers to the hosts
(`send`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from llm_jax.planner.hlo_text import Computations, Instruction, array_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
PERMUTE = "collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    bytes: of the whole array: what an all-gather gives, an all-reduce or reduce-scatter takes; of
    what is exchanged by the others. group_size: devices that take part together, or None (permutes).
    times: runs in one step. loops: the bodies of the loops it is in, the innermost last.
    overlapped: asynchronous, or inside the fusion of a matrix product. name: of the scheduled
    instruction that it is or begins in. groups: [groups, size] int, places in the order of the mesh's
    devices; of a permute [pairs, 2], from and to; None between slices, which the text leaves to the
    runtime. strategy: the TPU compiler's notes on how it goes.
    """

    kind: str
    bytes: int
    group_size: int | None
    times: int
    loops: tuple[str, ...]
    op_name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    overlapped: bool
    name: str = ""
    groups: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    strategy: str = dataclasses.field(default="", repr=False)

    @property
    def sent_bytes(self) -> float:
        """What one device sends in one run, around a ring."""
        share = 1.0 if not self.group_size else (self.group_size - 1) / self.group_size
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def num_devices(text: str) -> int:
    """That run the program together."""
    head = text[: text.find("\n")]
    partitions = re.search(r"\bnum_partitions=(\d+)", head)
    replicas = re.search(r"\breplica_count=(\d+)", head)
    return int(partitions[1] if partitions else 1) * int(replicas[1] if replicas else 1)


def collectives_in(
    computations: Computations, one: Instruction, chains: set[str]
) -> Iterator[tuple[Instruction, str]]:
    """The collectives that an instruction is or holds, and their kinds.

    chains: of one run of the computation; those met before are left out, new ones are added.
    """
    kind = _megascale(one) or one.opcode.removesuffix("-start")
    if kind in KINDS:
        chain = re.search(r'chain_id="([^"]*)"', one.attributes)
        if chain is None or chain[1] not in chains:
            yield one, kind
        if chain is not None:
            chains.add(chain[1])
        return
    targets = {"fusion": "calls", "async-start": "calls", "call-start": "to_apply"}
    if one.opcode not in targets:
        return
    for target in one.called(targets[one.opcode]):
        for called in computations.get(target, []):
            for inner, kind in collectives_in(computations, called, chains):
                yield inner, "reduce-scatter" if "reduce-scatter" in target else kind


def _megascale(one: Instruction) -> str | None:
    """The kind of an exchange between slices: a transfer to the host, which does the rest."""
    if one.opcode != "send":
        return None
    found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', one.attributes)
    kind = found[1].lower().replace("_", "-") if found else None
    return PERMUTE if kind == "one-to-one" else kind


def read_collective(
    one: Instruction, kind: str, start: Instruction, times: int, loops: Sequence[str], devices: int
) -> Collective:
    """A collective found in the scheduled instruction `start`, in a program for so many devices."""
    groups = None if one.opcode == "send" else replica_groups(one, devices)
    size = None if kind == PERMUTE or groups is None else groups.shape[1]
    strategy = re.search(r'"collective_algorithm_config":\{.*?\}"?\}', one.attributes)
    offload = '"collective_offload_config"' in one.attributes
    return Collective(
        kind=kind,
        bytes=_whole_bytes(one, size),
        group_size=size,
        times=times,
        loops=tuple(loops),
        op_name=one.op_name,
        shapes=one.shapes,
        overlapped=start.opcode.endswith(("-start", "send")) or "chain_id=" in one.attributes,
        name=start.name,
        groups=groups,
        strategy=one.attributes if offload else strategy[0] if strategy else "",
    )


def replica_groups(one: Instruction, devices: int) -> np.ndarray | None:
    """[groups, size] devices that take part together; of a permute its [pairs, 2].

    Written as a mesh and some of its axes, as a transposed range, or as a list; none means all.
    """
    if one.opcode.startswith(PERMUTE):
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.attributes)
        numbers = [int(number) for number in re.findall(r"\d+", pairs[1])] if pairs else []
        return np.array(numbers, int).reshape(-1, 2)
    mesh = _MESH.search(one.attributes)
    if mesh:
        groups = _mesh_groups(mesh[1], mesh[4])
        return _iota(mesh[2], mesh[3]).ravel()[groups] if mesh[2] else groups
    iota = _IOTA.search(one.attributes)
    if iota:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", one.attributes)
    if listed:
        rows = [row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array([[int(place) for place in row] for row in rows])
    return np.arange(devices)[None]


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """A range in these dimensions, which are then transposed."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)


def _mesh_groups(axes: str, chosen: str) -> np.ndarray:
    """'a'=4,'b'=8 and 'b', or 'b':(2)4 for the part of size 4 of b after a part of size 2."""
    sizes = {name: [int(size)] for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    for name, before, size in parts:
        if size:
            whole = math.prod(sizes[name])
            sizes[name] = [int(before), int(size), whole // int(before) // int(size)]
    flat = [(name, index, n) for name, split in sizes.items() for index, n in enumerate(split)]
    wanted = [(name, 1 if size else 0) for name, _, size in parts]
    moved = [[(name, index) for name, index, _ in flat].index(key) for key in wanted]
    places = np.arange(math.prod(n for *_, n in flat)).reshape([n for *_, n in flat])
    rest = [axis for axis in range(len(flat)) if axis not in moved]
    size = math.prod(flat[axis][2] for axis in moved)
    return places.transpose(rest + moved).reshape(-1, size)


def _whole_bytes(one: Instruction, group: int | None) -> int:
    """Of the whole array a collective is about; see Collective."""
    kind = one.opcode.removesuffix("-start")
    sizes = [array_bytes(dtype, shape) for dtype, shape in one.shapes]
    if one.opcode == "send":
        return sizes[0]  # then come handles
    if not one.opcode.endswith("-start"):
        return sum(sizes) * (group or 1 if kind == "reduce-scatter" else 1)
    # The result of a start holds the operands first, then the results, and contexts of the backend.
    if kind == "all-reduce":
        return sum(sizes)
    count = len(one.operand_names) or 1
    return sum(sizes[:count] if kind == "reduce-scatter" else sizes[count : 2 * count])
