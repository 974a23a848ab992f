"""How long each instruction of a scheduled program takes, and what of it nothing hides.

Instructions run one after the other in the order of the schedule, the body of a loop as often as
the loop turns. How long one takes is known from, in this order:

- the TPU compiler's estimated cycles over the clock. They are those of a program, which on v5p
  runs on both TensorCores of a chip, and on TPU7x on one of two devices, beside the other's;
- the model of a Pallas kernel (kernels.py), or of a collective on its links (links.py);
- the roofline: the larger of FLOPs over peak and bytes over the rate of HBM.

What is asynchronous runs from its start to its done: a collective on the links of its mesh axes, a
copy between HBM and VMEM on the memory's engine, one to the host's memory on that of PCIe. On each
of these one thing runs at a time, in the order of the starts; a synchronous collective goes first
and delays those under way. What is not finished at the done is exposed, and the schedule waits for
it. What a loop, a call or a branch exchanges delays what was begun outside of it on the same links.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from llm_jax.planner import links
from llm_jax.planner.chips import Chip, matmul_flops
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.costs import Costs
from llm_jax.planner.hlo import NO_WORK, Place, branches, estimated_cycles
from llm_jax.planner.hlo_collectives import Collective, collectives_in, read_collective
from llm_jax.planner.hlo_text import Instruction, parse_computations
from llm_jax.planner.kernels import KernelCost, Mask, kernel_cost
from llm_jax.planner.plan import Exchange, Kind, Op
from llm_jax.planner.source import Sources, direction_of, frame_id, module_of

_HOST_SPACE = 5  # of memory, in layouts

# Take no time: views, and values that are there already.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "opt-barrier", "after-all",
         "partition-id", "replica-id", "add-dependency", "domain", "recv", "send-done",
         "async-update"}  # fmt: skip
_COPIES = {"copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate",
           "pad", "reshape", "broadcast"}  # fmt: skip
_OTHERS = {"iota", "sort", "rng-bit-generator", "custom-call", "infeed", "outfeed"}
_FAR = 6  # instructions to look back for a name
# What takes less than this share of an op's time is not what bounds it.
_TELLING = 0.1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """unknown_loops: what loops whose turns the program does not state belong to; they count once."""

    ops: tuple[Op, ...]
    exchanges: tuple[Exchange, ...]
    unknown_loops: tuple[str, ...]


def read_schedule(step: CompiledStep, chip: Chip) -> Schedule:
    """Everything that takes time in a step, on a chip with known rates.

    Raises:
      ValueError: the step's text holds no program.
    """
    walk = _Walk(step, chip)
    walk.run(walk.entry, Place())
    unknown = (
        module_of(op_name) or op_name or name for name, op_name in walk.unknown_loops.items()
    )
    return Schedule(tuple(walk.ops), tuple(walk.exchanges), tuple(dict.fromkeys(unknown)))


@dataclasses.dataclass(frozen=True)
class _Work:
    """What an instruction does in one run on one chip."""

    kind: Kind
    flops: float
    bytes: float
    seconds: float
    bound: str
    by: Literal["compiler", "roofline", "kernel", "link"]


@dataclasses.dataclass(frozen=True)
class _Run:
    """Of a computation, once. busy: seconds that each engine is taken, which may be at the same time."""

    seconds: float = 0.0
    busy: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def repeated(self, times: int) -> "_Run":
        return _Run(times * self.seconds, {name: times * s for name, s in self.busy.items()})


@dataclasses.dataclass
class _InFlight:
    """Something asynchronous. op, exchange: places in the walk's lists, completed when it is done."""

    op: int
    exchange: int | None
    engines: tuple[str, ...]
    finish: float


class _Walk:
    """One pass over the program, which collects ops and exchanges."""

    def __init__(self, step: CompiledStep, chip: Chip):
        self._step, self._chip = step, chip
        compute_dtype = step.config.get("train", {}).get("compute_dtype", "bfloat16")
        self._matmul_flops = matmul_flops(chip, compute_dtype)
        self.computations, self.entry = parse_computations(step.hlo)
        if self.entry is None:
            raise ValueError(
                "the step's text is no HLO module: it has no line that starts with ENTRY"
            )
        self._costs = Costs(self.computations)
        self._sources = Sources(step.hlo)
        self._mask = Mask.of(step.config)
        self._devices = math.prod(axis.size for axis in step.mesh)
        self.ops: list[Op] = []
        self.exchanges: list[Exchange] = []
        self.unknown_loops: dict[str, str] = {}

    def run(self, name: str, place: Place) -> "_Run":
        """Notes what a computation does in one run."""
        return _Timeline(self, name, place).run()

    def loop(self, one: Instruction, where: str, place: Place) -> "_Run":
        inside, trips = place.inside(self.computations, where, one)
        (body,) = one.called("body")
        if trips is None:
            self.unknown_loops[one.name] = one.op_name
            return self.run(body, inside)
        return self.run(body, inside).repeated(trips) if trips else _Run()

    def conditional(self, one: Instruction, place: Place) -> "_Run":
        """Only one branch runs: the slowest stands for all."""
        start, started = len(self.ops), len(self.exchanges)
        slowest, ops, exchanges = _Run(), [], []
        for branch in branches(one):
            run = self.run(branch, place)
            if run.seconds >= slowest.seconds:
                slowest, ops, exchanges = run, self.ops[start:], self.exchanges[started:]
            del self.ops[start:], self.exchanges[started:]
        self.ops += ops
        self.exchanges += exchanges
        return slowest

    def collectives(
        self, start: Instruction, place: Place, chains: set[str]
    ) -> list[tuple[Collective, Instruction]]:
        """What an instruction exchanges or begins to, each with the instruction that says so."""
        return [
            (read_collective(inner, kind, start, place.times, place.bodies, self._devices), inner)
            for inner, kind in collectives_in(self.computations, start, chains)
        ]

    def exchange_work(self, together: list[Collective]) -> tuple[_Work, str]:
        """Of what one instruction exchanges, one after the other; the mesh axes that it runs over."""
        seconds, moved, axes = 0.0, 0.0, {}
        for one in together:
            cross = links.crossing(one, self._step.mesh)
            seconds += links.seconds(one, cross, self._chip)
            moved += one.bytes * self._chip.devices
            axes |= dict.fromkeys(cross.axes.split("+"))
        named = "+".join(axes)
        return _Work("collective", 0.0, moved, seconds, f"communication {named}", "link"), named

    def copy_work(self, one: Instruction) -> tuple[_Work, str]:
        """What an asynchronous copy or slice moves, and the engine that does."""
        # A start holds source, target, what is written into it, and handles, which are scalars. Of
        # an array that a slice is taken from or put into, only the slice moves: the least of them.
        moved = min((float(a.bytes) for a in one.arrays if a.shape), default=0.0)
        moved *= self._chip.devices
        host = any(array.space == _HOST_SPACE for array in one.arrays)
        chip = self._chip
        rate = chip.host_bytes_per_second if host else chip.hbm_bytes_per_second
        bound = "communication host" if host else "memory"
        work = _Work("copy", 0.0, moved, moved / rate, bound, "roofline")
        return work, "host" if host else "memory"

    def work(self, where: str, one: Instruction) -> _Work | None:
        """What an instruction computes or copies; None if nothing."""
        if one.opcode in _FREE or (one.opcode == "custom-call" and one.target in NO_WORK):
            return None
        cost = self._cost(where, one)
        chip, devices = self._chip, self._chip.devices
        compute = cost.flops * devices / self._matmul_flops
        memory = cost.bytes * devices / chip.hbm_bytes_per_second
        cycles = estimated_cycles(one)
        busy, by = compute, "roofline"
        if cycles is not None and chip.clock_hz:
            seconds, by = cycles / chip.clock_hz, "compiler"
        else:
            if cost.seconds is not None:
                busy, by = cost.seconds, "kernel"
            seconds = max(busy, memory)
        if seconds <= 0:
            return None
        bound = "memory" if memory > busy else "compute"
        if max(memory, busy) < _TELLING * seconds:
            bound = "other"  # such as the vector unit's work in VMEM
        return _Work(cost.kind, cost.flops * devices, cost.bytes * devices, seconds, bound, by)

    def _cost(self, where: str, one: Instruction) -> KernelCost:
        if one.opcode == "custom-call" and re.search("tpu_custom_call|fmha", one.target):
            operands = [self._costs.operand(where, one, i) for i in range(len(one.operand_names))]
            known = [operand for operand in operands if operand is not None]
            return kernel_cost(one, known, self._mask, self._chip)
        flops, moved = self._costs.flops(where, one), self._costs.bytes(where, one)
        return KernelCost(_kind_of(one, flops), flops, moved, None)

    def note(
        self, one: Instruction, place: Place, work: _Work, exposed: float, named: Instruction
    ) -> int:
        """Adds an op; its place in `ops`. named: the instruction that says where it is from."""
        self.ops.append(
            Op(
                name=one.name,
                kind=work.kind,
                direction=direction_of(named.op_name),
                op_name=named.op_name,
                source=self._sources.of(frame_id(named.attributes)),
                module=module_of(named.op_name),
                times=place.times,
                flops=work.flops,
                bytes=work.bytes,
                seconds=work.seconds,
                exposed=exposed,
                bound=work.bound,
                by=work.by,
            )
        )
        return len(self.ops) - 1

    def note_exchange(self, collective: Collective, axes: str, op: Op) -> int:
        """Adds what `op` exchanges; its place in `exchanges`."""
        self.exchanges.append(
            Exchange(
                name=collective.name,
                kind=collective.kind,
                axes=axes,
                bytes=collective.bytes,
                sent_bytes=collective.sent_bytes,
                times=collective.times,
                seconds=op.seconds,
                exposed=op.exposed,
                tensor="",
                role="other",
                direction=op.direction,
                source=op.source,
                op_name=op.op_name,
            )
        )
        return len(self.exchanges) - 1

    def expose(self, flight: _InFlight, seconds: float) -> None:
        """Notes how long the schedule waits for something asynchronous."""
        self.ops[flight.op] = dataclasses.replace(self.ops[flight.op], exposed=seconds)
        if flight.exchange is not None:
            one = self.exchanges[flight.exchange]
            self.exchanges[flight.exchange] = dataclasses.replace(one, exposed=seconds)


class _Timeline:
    """One run of one computation: a clock, what is in flight, and when each engine is free."""

    def __init__(self, walk: _Walk, name: str, place: Place):
        self._walk, self._name, self._place = walk, name, place
        self._clock = 0.0
        self._free: dict[str, float] = {}
        self._flights: dict[str, _InFlight] = {}
        self._chains: set[str] = set()
        self._busy: collections.Counter[str] = collections.Counter()
        self._by_name = {one.name: one for one in walk.computations[name]}

    def run(self) -> _Run:
        for one in self._walk.computations[self._name]:
            self._step(one)
        for key in list(self._flights):
            self._finish(key)
        return _Run(self._clock, self._busy)

    def _step(self, one: Instruction) -> None:
        walk, place = self._walk, self._place
        if one.opcode == "while":
            self._enter(walk.loop(one, self._name, place))
        elif one.opcode == "call":
            for name in one.called("to_apply"):
                self._enter(walk.run(name, place))
        elif one.opcode == "conditional":
            self._enter(walk.conditional(one, place))
        else:
            ended = self._ended(one)
            if ended is not None:
                self._finish(ended)
            else:
                self._begin_or_do(one)

    def _begin_or_do(self, one: Instruction) -> None:
        found = self._walk.collectives(one, self._place, self._chains)
        if found:
            self._exchange(one, [collective for collective, _ in found], found[0][1])
        elif one.opcode.endswith("-start"):
            work, engine = self._walk.copy_work(one)
            op = self._walk.note(one, self._place, work, 0.0, self._named(one))
            self._begin(one.name, _InFlight(op, None, (engine,), 0.0), work.seconds)
        else:
            work = self._walk.work(self._name, one)
            if work is not None:
                self._walk.note(one, self._place, work, work.seconds, self._named(one))
                self._clock += work.seconds

    def _exchange(self, one: Instruction, together: list[Collective], inner: Instruction) -> None:
        work, axes = self._walk.exchange_work(together)
        # Listed as the first of them, with the bytes of all.
        collective = dataclasses.replace(together[0], bytes=sum(c.bytes for c in together))
        key = self._key(one)
        exposed = work.seconds if key is None else 0.0
        named = inner if inner.op_name else self._named(one)
        op = self._walk.note(one, self._place, work, exposed, named)
        exchange = self._walk.note_exchange(collective, axes, self._walk.ops[op])
        engines = tuple(axes.split("+"))
        if key is None:
            self._enter(_Run(work.seconds, dict.fromkeys(engines, work.seconds)))
        else:
            self._begin(key, _InFlight(op, exchange, engines, 0.0), work.seconds)

    def _begin(self, key: str, flight: _InFlight, seconds: float) -> None:
        free = (self._free.get(engine, 0.0) for engine in flight.engines)
        flight.finish = max(self._clock, *free) + seconds
        self._free.update(dict.fromkeys(flight.engines, flight.finish))
        self._busy.update(dict.fromkeys(flight.engines, seconds))
        self._flights[key] = flight

    def _enter(self, run: _Run) -> None:
        """Waits for something synchronous; what is under way on its engines ends so much later."""
        for flight in self._flights.values():
            if flight.finish > self._clock:
                flight.finish += max(
                    (run.busy.get(name, 0.0) for name in flight.engines), default=0
                )
        for engine, seconds in run.busy.items():
            if self._free.get(engine, 0.0) > self._clock:
                self._free[engine] += seconds
        self._busy.update(run.busy)
        self._clock += run.seconds

    def _finish(self, key: str) -> None:
        flight = self._flights.pop(key, None)
        if flight is not None:
            waited = max(0.0, flight.finish - self._clock)
            self._clock += waited
            self._walk.expose(flight, waited)

    def _key(self, one: Instruction) -> str | None:
        """Under which its end will ask for it; None for a synchronous collective."""
        if one.opcode == "send":
            return _rendezvous(one)
        if one.opcode.endswith("-start"):
            return one.name
        if one.opcode == "fusion" and self._holds(one, "AsyncCollectiveStart"):
            return _chain(self._walk.computations[one.called("calls")[0]])
        return None

    def _ended(self, one: Instruction) -> str | None:
        """The key of what this instruction waits for."""
        if one.opcode == "recv-done":
            return _rendezvous(self._by_name.get(one.operand_names[0], one))
        if one.opcode.endswith("-done"):
            return self._start_of(one.operand_names[0])
        if one.opcode == "fusion" and self._holds(one, "AsyncCollectiveDone"):
            return _chain(self._walk.computations[one.called("calls")[0]])
        return None

    def _start_of(self, name: str) -> str:
        """The start behind updates and tuples."""
        one = self._by_name.get(name)
        while one is not None and one.opcode in ("get-tuple-element", "async-update", "bitcast"):
            name = one.operand_names[0]
            one = self._by_name.get(name)
        return name

    def _holds(self, one: Instruction, target: str) -> bool:
        inner = self._walk.computations.get(next(iter(one.called("calls")), ""), ())
        return any(each.opcode == "custom-call" and each.target == target for each in inner)

    def _named(self, one: Instruction) -> Instruction:
        """The instruction itself, or the first of those that feed it that says where it is from."""
        seen = one
        for _ in range(_FAR):
            if seen.op_name:
                return seen
            feeding = [self._by_name[n] for n in seen.operand_names if n in self._by_name]
            if not feeding:
                break
            seen = next((f for f in feeding if f.op_name), feeding[0])
        return seen if seen.op_name or not self._place.loops else self._place.loops[-1][1]


def _rendezvous(one: Instruction) -> str:
    """What a send and the receive of its answer share."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', one.attributes)
    return "rendezvous " + (found[1] if found else one.name)


def _chain(instructions: list[Instruction]) -> str | None:
    """Of an asynchronous collective inside fusions."""
    for one in instructions:
        found = re.search(r'chain_id="([^"]*)"', one.attributes)
        if found:
            return f"chain {found[1]}"
    return None


def _kind_of(one: Instruction, flops: float) -> Kind:
    if flops:
        return "matmul"
    if one.opcode in _COPIES:
        return "copy"
    return "other" if one.opcode in _OTHERS else "elementwise"
