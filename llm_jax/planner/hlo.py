"""What a compiled program will do, read from its HLO text: collectives, loops, cycles, buffers.

`analyse(compiled.as_text())` walks the scheduled computations from the entry and multiplies by the
trip counts of the loops, so its numbers are per step. The TPU compiler notes estimated cycles on
what its own code generator makes; Pallas kernels and collectives carry none. They are counted in
`untimed`, and `cycles` is the rest.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from llm_jax.planner.hlo_collectives import (
    Collective,
    collectives_in,
    num_devices,
    read_collective,
)
from llm_jax.planner.hlo_text import Computations, Instruction, array_bytes, parse_computations
from llm_jax.planner.trips import trip_count

Direction = Literal["forward", "backward", "other"]


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
        return _totals(
            (c, c.times // max(loop.times, 1)) for c in self.collectives if loop.body in c.loops
        )

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
NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call",
             "conditional", "opt-barrier", "after-all", "partition-id", "replica-id"}  # fmt: skip
# Custom calls that do no work: they allocate, promise something to the compiler, or mark a place.
NO_WORK = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding",
           "SPMDFullToShardShape", "SPMDShardToFullShape", "PrepareAsyncCallStart",
           "PrepareAsyncCallDone", "AsyncCollectiveStart", "AsyncCollectiveDone"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a walk stands. loops: each with the computation that holds it, the outermost first.

    times: runs of this place in one step.
    """

    loops: tuple[tuple[str, Instruction], ...] = ()
    times: int = 1

    @property
    def bodies(self) -> tuple[str, ...]:
        return tuple(body for _, loop in self.loops for body in loop.called("body"))

    def inside(
        self, computations: Computations, where: str, loop: Instruction
    ) -> tuple["Place", int | None]:
        """The place of a loop's body, and the trips of the loop; None, and one run, where nobody knows."""
        loops = (*self.loops, (where, loop))
        trips = trip_count(computations, loops)
        return Place(loops, self.times * (1 if trips is None else trips)), trips


def estimated_cycles(one: Instruction) -> int | None:
    """Of the TPU compiler, for one run; None where it has no estimate."""
    found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
    # The compiler marks what it does not know with the largest number.
    return int(found[1]) if found and int(found[1]) < 2**62 else None


def branches(one: Instruction) -> list[str]:
    """The computations of a conditional."""
    return one.called("true_computation", "false_computation", "branch_computations")


class _Reader:
    """One walk through a program from its entry."""

    def __init__(self, text: str):
        self.computations, self.entry = parse_computations(text)
        if self.entry is None:
            raise ValueError("this text is no HLO module: it has no line that starts with ENTRY")
        self.devices = num_devices(text)
        self.collectives: list[Collective] = []
        self.loops: list[Loop] = []
        self.buffers: list[Buffer] = []
        self.untimed: collections.Counter[str] = collections.Counter()
        self.cycles_by_kind: collections.Counter[str] = collections.Counter()
        self._seen: set[str] = set()

    def summary(self) -> HloSummary:
        cycles = self.walk(self.entry, Place())
        return HloSummary(
            collectives=tuple(self.collectives),
            loops=tuple(self.loops),
            cycles=cycles,
            cycles_by_kind=dict(self.cycles_by_kind.most_common()),
            untimed=dict(self.untimed.most_common()),
            buffers=tuple(self.buffers),
        )

    def walk(self, name: str, place: Place) -> int:
        """Notes what the runs of a computation do; the cycles of one run."""
        cycles, chains = 0, set()
        for one in self.computations.get(name, []):
            self._note_buffers(one, name)
            if one.opcode == "while":
                cycles += self._walk_loop(one, name, place)
            elif one.opcode == "call":
                cycles += sum(self.walk(called, place) for called in one.called("to_apply"))
            elif one.opcode == "conditional":
                # Only one of them runs: the dearest stands for all.
                cycles += max((self.walk(b, place) for b in branches(one)), default=0)
            else:
                cycles += self._note_work(one, place, chains)
        self._seen.add(name)
        return cycles

    def _walk_loop(self, one: Instruction, where: str, place: Place) -> int:
        inside, known = place.inside(self.computations, where, one)
        trips = 1 if known is None else known
        (body,) = one.called("body")
        index = len(self.loops)
        cycles = self.walk(body, inside)
        loop = Loop(body, trips, inside.times, _direction(one.op_name), cycles, one.op_name)
        self.loops.insert(index, loop)
        return cycles * trips

    def _note_work(self, one: Instruction, place: Place, chains: set[str]) -> int:
        kinds = []
        for inner, kind in collectives_in(self.computations, one, chains):
            found = read_collective(inner, kind, one, place.times, place.bodies, self.devices)
            self.collectives.append(found)
            kinds.append(kind)
        cycles = estimated_cycles(one)
        if cycles is not None:
            self.cycles_by_kind[one.opcode] += place.times * cycles
            return cycles
        for kind in kinds:
            self.untimed[kind] += place.times
        if one.opcode == "custom-call" and one.target not in NO_WORK:
            self.untimed[one.target] += place.times
        return 0

    def _note_buffers(self, one: Instruction, where: str) -> None:
        if one.opcode in NO_BUFFER or where in self._seen:
            return
        for dtype, shape in one.shapes:
            size = array_bytes(dtype, shape)
            self.buffers.append(Buffer(dtype, shape, size, one.name, one.op_name))


def _direction(op_name: str) -> Direction:
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "other"
