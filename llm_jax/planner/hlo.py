"""What a compiled program will do, read from its HLO text: collectives, loops, cycles, buffers.

`analyse(compiled.as_text())` walks the scheduled computations from the entry and multiplies by the
trip counts of the loops, so its numbers are per step. Two things to know:

- The TPU compiler notes estimated cycles on what its own code generator makes; Pallas kernels and
  collectives carry none. They are counted in `untimed`, and `cycles` is the rest.
- Collectives hide in fusions: a reduce-scatter is a fusion of an all-reduce and a slice, an
  asynchronous collective runs inside the fusion of a matrix product. They are looked for there.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from llm_jax.planner.hlo_text import Instruction, array_bytes, parse_computations

Direction = Literal["forward", "backward", "other"]

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    bytes: of the whole array: what an all-gather gives, an all-reduce or reduce-scatter takes; of
    what is exchanged by the others. group_size: devices that take part together, or None (permutes).
    times: runs in one step. loops: the bodies of the loops it is in, the innermost last.
    overlapped: asynchronous, or inside the fusion of a matrix product.
    """

    kind: str
    bytes: int
    group_size: int | None
    times: int
    loops: tuple[str, ...]
    op_name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    overlapped: bool

    @property
    def sent_bytes(self) -> float:
        """What one device sends in one run, around a ring."""
        share = 1.0 if not self.group_size else (self.group_size - 1) / self.group_size
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Loop:
    """times: runs of the body in one step, over all outer loops. cycles: of one run of the body."""

    body: str
    trips: int
    times: int
    direction: Direction
    cycles: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Buffer:
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    instruction: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Total:
    """Runs and sums over a step or a layer; bytes and sent_bytes as in Collective.

    overlapped: how many of the runs have other work beside them.
    """

    count: int
    bytes: int
    sent_bytes: float
    overlapped: int


@dataclasses.dataclass(frozen=True)
class HloSummary:
    """cycles: estimated by the TPU compiler, 0 elsewhere; by opcode in cycles_by_kind.

    untimed: runs in a step of what carries no estimate: custom calls by target ("tpu_custom_call"
    are Pallas kernels), collectives by kind.
    """

    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]
    cycles: int
    cycles_by_kind: Mapping[str, int]
    untimed: Mapping[str, int]
    buffers: tuple[Buffer, ...]

    def totals(self) -> dict[str, Total]:
        """Per kind of collective, over one step."""
        return _totals((c, c.times) for c in self.collectives)

    def loop_totals(self, loop: Loop) -> dict[str, Total]:
        """Per kind of collective, over one run of the loop's body."""
        return _totals((c, c.times // loop.times) for c in self.collectives if loop.body in c.loops)

    def layers(self, direction: Direction) -> Loop | None:
        """The loop over layers of a pass: the one in which most of its time goes, or bytes move."""
        loops = [loop for loop in self.loops if loop.direction == direction and loop.trips > 1]
        moved = lambda loop: sum(t.bytes for t in self.loop_totals(loop).values())  # noqa: E731
        return max(loops, key=lambda x: (x.cycles * x.times, moved(x) * x.times), default=None)

    def largest_buffers(self, count: int = 10) -> tuple[Buffer, ...]:
        """The largest arrays that any computation writes, each shape once."""
        first: dict[tuple, Buffer] = {}
        for buffer in self.buffers:
            first.setdefault((buffer.dtype, buffer.shape), buffer)
        return tuple(sorted(first.values(), key=lambda b: -b.bytes)[:count])

    def has_buffer(self, shape: Sequence[int], dtype: str | None = None) -> bool:
        """Whether an array of this shape (per device) is written; dtype in HLO's names, e.g. bf16."""
        return any(b.shape == tuple(shape) and dtype in (None, b.dtype) for b in self.buffers)


def analyse(text: str) -> HloSummary:
    """Reads the text of a compiled program.

    Raises:
      ValueError: the text holds no entry computation.
    """
    return _Reader(text).summary()


def _totals(collectives: Iterator[tuple[Collective, int]]) -> dict[str, Total]:
    sums: dict[str, Total] = {}
    for one, times in collectives:
        before = sums.get(one.kind, Total(0, 0, 0.0, 0))
        sums[one.kind] = Total(
            before.count + times,
            before.bytes + one.bytes * times,
            before.sent_bytes + one.sent_bytes * times,
            before.overlapped + one.overlapped * times,
        )
    return dict(sorted(sums.items(), key=lambda item: -item[1].bytes))


# Results that are views of other buffers, or values that never reach memory.
_NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call",
              "conditional", "opt-barrier", "after-all", "partition-id", "replica-id"}  # fmt: skip
# Custom calls that do no work: they allocate, or promise something to the compiler.
_NO_WORK = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding",
            "SPMDFullToShardShape", "SPMDShardToFullShape"}  # fmt: skip


class _Reader:
    """One walk through a program from its entry."""

    def __init__(self, text: str):
        self.computations, self.entry = parse_computations(text)
        if self.entry is None:
            raise ValueError("this text is no HLO module: it has no line that starts with ENTRY")
        partitions = re.search(r"\bnum_partitions=(\d+)", text)
        replicas = re.search(r"\breplica_count=(\d+)", text)
        self.devices = int(partitions[1] if partitions else 1) * int(replicas[1] if replicas else 1)
        self.collectives: list[Collective] = []
        self.loops: list[Loop] = []
        self.buffers: list[Buffer] = []
        self.untimed: collections.Counter[str] = collections.Counter()
        self.cycles_by_kind: collections.Counter[str] = collections.Counter()
        self._seen: set[str] = set()

    def summary(self) -> HloSummary:
        cycles = self.walk(self.entry, 1, ())
        return HloSummary(
            collectives=tuple(self.collectives),
            loops=tuple(self.loops),
            cycles=cycles,
            cycles_by_kind=dict(self.cycles_by_kind.most_common()),
            untimed=dict(self.untimed.most_common()),
            buffers=tuple(self.buffers),
        )

    def walk(self, name: str, times: int, loops: tuple[str, ...]) -> int:
        """Notes what `times` runs of a computation do; the cycles of one run."""
        cycles, chains = 0, set()
        for one in self.computations.get(name, []):
            self._note_buffers(one, name)
            if one.opcode == "while":
                cycles += self._walk_loop(one, times, loops)
            elif one.opcode in ("call", "async-start"):
                cycles += self._walk_called(one, times, loops)
            elif one.opcode == "conditional":
                branches = one.called(
                    "true_computation", "false_computation", "branch_computations"
                )
                # Only one of them runs: the dearest stands for all.
                cycles += max((self.walk(b, times, loops) for b in branches), default=0)
            else:
                cycles += self._note_work(one, times, loops, chains)
        self._seen.add(name)
        return cycles

    def _walk_called(self, one: Instruction, times: int, loops: tuple[str, ...]) -> int:
        first = len(self.collectives)
        cycles = sum(self.walk(name, times, loops) for name in one.called("to_apply", "calls"))
        if one.opcode == "async-start":
            inner = (dataclasses.replace(c, overlapped=True) for c in self.collectives[first:])
            self.collectives[first:] = inner
        return cycles

    def _walk_loop(self, one: Instruction, times: int, loops: tuple[str, ...]) -> int:
        trips = self._trips(one)
        (body,) = one.called("body")
        index = len(self.loops)
        cycles = self.walk(body, times * trips, (*loops, body))
        loop = Loop(body, trips, times * trips, _direction(one.op_name), cycles, one.op_name)
        self.loops.insert(index, loop)
        return cycles * trips

    def _note_work(
        self, one: Instruction, times: int, loops: tuple[str, ...], chains: set[str]
    ) -> int:
        kinds = []
        for inner, kind in self._collectives_in(one, chains):
            self._note_collective(inner, kind, times, loops)
            kinds.append(kind)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        if estimate and int(estimate[1]) < 2**62:  # the compiler's mark for "unknown"
            self.cycles_by_kind[one.opcode] += times * int(estimate[1])
            return int(estimate[1])
        for kind in kinds:
            self.untimed[kind] += times
        if one.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', one.attributes)[1]
            if target not in _NO_WORK:
                self.untimed[target] += times
        return 0

    def _note_buffers(self, one: Instruction, where: str) -> None:
        if one.opcode in _NO_BUFFER or where in self._seen:
            return
        for dtype, shape in one.shapes:
            size = array_bytes(dtype, shape)
            self.buffers.append(Buffer(dtype, shape, size, one.name, one.op_name))

    def _collectives_in(
        self, one: Instruction, chains: set[str]
    ) -> Iterator[tuple[Instruction, str]]:
        """The collectives that an instruction is or holds, and their kinds.

        A collective that runs beside several fusions stands in each of them, with one chain_id.
        """
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            chain = re.search(r'chain_id="([^"]*)"', one.attributes)
            if chain is None or chain[1] not in chains:
                yield one, kind
            if chain is not None:
                chains.add(chain[1])
        elif one.opcode == "fusion":
            for target in one.called("calls"):
                for called in self.computations.get(target, []):
                    for inner, kind in self._collectives_in(called, chains):
                        yield inner, "reduce-scatter" if "reduce-scatter" in target else kind

    def _note_collective(
        self, one: Instruction, kind: str, times: int, loops: tuple[str, ...]
    ) -> None:
        group = self._group_size(one)
        self.collectives.append(
            Collective(
                kind=kind,
                bytes=_whole_bytes(one, group),
                group_size=group,
                times=times,
                loops=loops,
                op_name=one.op_name,
                shapes=one.shapes,
                overlapped=one.opcode.endswith("-start") or "chain_id=" in one.attributes,
            )
        )

    def _group_size(self, one: Instruction) -> int | None:
        if one.opcode.startswith("collective-permute"):
            return None
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", one.attributes)
        if mesh:
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", one.attributes)
        if iota:
            return int(iota[2])
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", one.attributes)
        return len(listed[1].split(",")) if listed else self.devices

    def _trips(self, one: Instruction) -> int:
        """How often a loop runs; 1 where the text does not say."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
        if known:
            return int(known[1])
        (condition,) = one.called("condition")
        constants = [
            int(inner.operands)
            for inner in self._with_fused(condition)
            if inner.opcode == "constant" and inner.operands.isdigit()
        ]
        return max(constants, default=1)

    def _with_fused(self, name: str) -> Iterator[Instruction]:
        for one in self.computations.get(name, []):
            yield one
            for target in one.called("calls"):
                yield from self._with_fused(target)


def _whole_bytes(one: Instruction, group: int | None) -> int:
    """Of the whole array a collective is about; see Collective."""
    kind = one.opcode.removesuffix("-start")
    sizes = [array_bytes(dtype, shape) for dtype, shape in one.shapes]
    if not one.opcode.endswith("-start"):
        return sum(sizes) * (group or 1 if kind == "reduce-scatter" else 1)
    # The result of a start holds the operands first, then the results, and contexts of the backend.
    if kind == "all-reduce":
        return sum(sizes)
    count = len(re.findall(r"%[\w.\-]+", one.operands)) or 1
    return sum(sizes[:count] if kind == "reduce-scatter" else sizes[count : 2 * count])


def _direction(op_name: str) -> Direction:
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "other"
