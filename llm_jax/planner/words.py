"""How a plan is put into words, on a terminal and on a page alike: sizes, times, the verdict.

Sizes are in GiB, as memory is sold; bandwidth and FLOPs in powers of ten, as rates are.
"""

import collections
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from llm_jax.planner.plan import (
    Direction,
    Exchange,
    Finding,
    LiveBuffer,
    Memory,
    Op,
    Part,
    Plan,
    Roofline,
)

GIB = 2**30
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "optimizer", "other")
BY = {
    "compiler": "the compiler's own cycles",
    "kernel": "models of kernels",
    "link": "models of links",
    "roofline": "FLOPs and bytes at the chip's rates",
}
# What says nothing of the work at the end of a name.
_UNTOLD = ("", "pallas_call")
ESTIMATED = "estimated by arithmetic, nothing was compiled"


def number(value: float) -> str:
    """Three digits, four places at most: 0.0821, 4.84, 95.7, 1,234."""
    if value >= 99.95:
        return f"{value:,.0f}"
    places = 1 if value >= 9.995 else 2 if value >= 0.9995 else 3 if value >= 0.09995 else 4
    return f"{value:.{places}f}" if value else "0"


def size(count: float) -> str:
    """Bytes to three digits: "4.84 GiB", "312 MiB"."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= 0.9995 * unit:
            return f"{number(count / unit)} {name}"
    return f"{count:.0f} B"


def gib(count: float) -> str:
    """Bytes in GiB, to two places, as capacities are told: "15.75"."""
    return f"{count / GIB:,.2f}"


def duration(seconds: float) -> str:
    """Three digits: "351 ms", "1.24 s", "18 µs"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * unit:
            return f"{number(seconds / unit)} {name}"
    return "0 s" if seconds <= 0 else f"{seconds * 1e9:.0f} ns"


def milliseconds(seconds: float) -> str:
    """For a column without units."""
    return number(seconds * 1e3)


def percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f} %" if value >= 99.95 or value == 0 else f"{value:.1f} %"


def rate(per_second: float) -> str:
    """Of FLOPs or bytes: "459 T"."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= 0.9995 * unit:
            return f"{number(per_second / unit)} {name}"
    return f"{per_second:.0f} "


def amount(count: float) -> str:
    """Of tokens or parameters: "1.37 B"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            return f"{number(count / unit)} {name}"
    return f"{count:.0f}"


def money(dollars: float) -> str:
    if 0 < dollars < 0.0995:  # small models on the tokens of a search
        return f"${number(dollars)}"
    return f"${dollars:,.0f}" if dollars >= 100 else f"${dollars:.2f}"


def days(count: float) -> str:
    for unit, name in ((1.0, "days"), (1 / 24, "hours")):
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return f"{number(24 * 60 * count)} minutes"


def chips(count: int) -> str:
    return f"{count:,} chip{'s' * (count != 1)}"


def mesh_sizes(mesh: Mapping[str, int]) -> str:
    """The axes that share something: "fsdp 16 × tensor 4"."""
    return " × ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"


def verdict(plan: Plan) -> str:
    """The answer to the first question, in one line."""
    memory = plan.memory
    if not memory.capacity:
        return f"needs {size(memory.peak)} per chip; how much there is, is not known"
    share = memory.peak / memory.capacity
    if plan.fits:
        return f"fits: {gib(memory.peak)} of {gib(memory.capacity)} GiB per chip ({percent(share)})"
    return (
        f"does not fit: needs {gib(memory.peak)} GiB of {gib(memory.capacity)} per chip "
        f"({excess(memory)} over)"
    )


def excess(memory: Memory) -> str:
    """By how much a peak is over the capacity: "37.1 %", or where that tells nothing "4.00 MiB"."""
    missing = memory.peak - memory.capacity
    share = percent(missing / memory.capacity)
    alike = gib(memory.peak) == gib(memory.capacity) or share == "0.0 %"
    return size(missing) if alike else share


def subject(plan: Plan) -> str:
    """What was planned: "v5p:4x4x4: 64 chips, mesh fsdp 64; 1.37 B parameters, ..."."""
    return (
        f"{plan.target}: {chips(plan.num_chips)}, mesh {mesh_sizes(plan.mesh)}; "
        f"{amount(plan.num_params)} parameters, {plan.tokens_per_step:,} tokens a step"
    )


def utilization(roofline: Roofline) -> str:
    """Both conventions, named; "" where the family counts no model FLOPs."""
    said = []
    if roofline.mfu is not None:
        said.append(f"{percent(roofline.mfu)} (all scores)")
    if roofline.mfu_causal is not None:
        said.append(f"{percent(roofline.mfu_causal)} (causal scores)")
    return "MFU " + ", ".join(said) if said else ""


def binding(roofline: Roofline) -> tuple[str, float]:
    """What takes the most time, and its share of the step."""
    name = max(roofline.bounds, key=roofline.bounds.get)
    return name, roofline.bounds[name] / roofline.step_seconds


def ordered_bounds(bounds: Mapping[str, float]) -> dict[str, float]:
    """Compute, memory, communication with the dearest axis first, the rest."""
    places = {"compute": 0, "memory": 1, "other": 3}
    names = sorted(bounds, key=lambda name: (places.get(name, 2), -bounds[name]))
    return {name: bounds[name] for name in names if bounds[name] > 0}


def ordered_parts(memory: Memory) -> dict[str, int]:
    """The parts that there are, in their order."""
    return {part: memory.parts[part] for part in get_args(Part) if memory.parts.get(part)}


def by_direction(roofline: Roofline) -> dict[str, dict[str, float]]:
    """Seconds by pass and by bound; one row, "step", where operations are not known."""
    if not roofline.ops:
        return {"step": ordered_bounds(roofline.bounds)}
    total: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.Counter())
    for op in roofline.ops:
        total[op.direction][op.bound] += op.exposed * op.times
    return {name: ordered_bounds(total[name]) for name in DIRECTIONS if any(total[name].values())}


def who_says(plan: Plan) -> str:
    """What the times rest on, with shares: a sentence."""
    roofline = plan.roofline
    if roofline is None or not roofline.ops:
        return ""
    time: dict[str, float] = collections.Counter()
    for op in roofline.ops:
        time[op.by] += op.exposed * op.times
    total = sum(time.values()) or 1.0
    shares = [f"{BY[by]} {percent(time[by] / total)}" for by in BY if time[by] > 5e-4 * total]
    if roofline.efficiency != 1:
        shares.append(f"all divided by {roofline.efficiency:.3g}, the efficiency of {plan.chip}")
    return "times by " + ", ".join(shares) + _measured(plan)


def _measured(plan: Plan) -> str:
    """The rates that this machine was asked for, for want of a table; "" where there are none."""
    rates = plan.step.measured if plan.step else {}
    if not rates:
        return ""
    flops, moved = (rate(rates[name]) for name in ("peak_flops", "bytes_per_second"))
    return f"; rates measured on this machine: {flops}FLOP/s and {moved}B/s of a device"


def work(op: Op | Exchange) -> str:
    """What an instruction does: its einsum, its kernel, its primitive, or else its own name."""
    pieces = [piece for piece in op.op_name.split(";")[0].split("/") if piece not in _UNTOLD]
    einsum = next((piece for piece in reversed(pieces) if "->" in piece), None)
    return einsum or (re.sub(r"^(?:\w*\()+|\)+$", "", pieces[-1]) if pieces else op.name)


def array(buffer: LiveBuffer, count: int = 1) -> str:
    """As compiled: "bf16[24,8,2048,2048]", "12 × f32[8,256,704]"."""
    times = f"{count} × " if count > 1 else ""
    return f"{times}{buffer.dtype}[{','.join(map(str, buffer.shape))}]"


def whole(buffer: LiveBuffer) -> str:
    """The array of which the compiled one is a share: "of 24×2048×5632 [-, fsdp, -]"; "" if not known."""
    if buffer.logical_shape is None:
        return ""
    shape = "×".join(map(str, buffer.logical_shape)) or "a scalar"
    return f"of {shape}" + (f" {buffer.sharding}" if buffer.sharding else "")


def remedy(buffer: LiveBuffer) -> str:
    """The change that makes it smaller: "model.remat=full saves 1.2 GiB"."""
    if buffer.change is None:
        return ""
    return buffer.change + (f" saves {size(buffer.saves)}" if buffer.saves else "")


def price_of(finding: Finding) -> str:
    """What a finding costs beside what its text says: "1.2 GiB, 14 ms a step"."""
    memory = size(finding.bytes)
    costs = [memory] if finding.bytes and memory not in finding.text else []
    costs += [f"{duration(finding.seconds)} a step"] if finding.seconds else []
    return ", ".join(costs)


def cure(plan: Plan) -> str | None:
    """The overrides, with spaces between them, by which a plan would fit; None where none is known."""
    changes = (f.change for f in plan.findings if f.kind == "memory" and f.change)
    return None if plan.fits else next(changes, None)


def untold(finding: Finding) -> bool:
    """Whether there is a change that the text does not name already."""
    return finding.change is not None and finding.change not in finding.text


_ALIKE_BUFFERS = operator.attrgetter(
    "part", "dtype", "shape", "logical_shape", "sharding", "module", "source", "change"
)
_ALIKE_EXCHANGES = operator.attrgetter(
    "kind", "axes", "tensor", "role", "direction", "source", "bytes"
)


def largest_buffers(memory: Memory, most: int) -> list[tuple[int, LiveBuffer]]:
    """(how many, together) of the arrays at the peak; those that are alike in all but their name."""
    groups = [(len(same), _together(same)) for same in _grouped(memory.buffers, _ALIKE_BUFFERS)]
    return sorted(groups, key=lambda group: -group[1].bytes)[:most]


def _together(buffers: Sequence[LiveBuffer]) -> LiveBuffer:
    saves = sum(b.saves or 0 for b in buffers) or None
    return dataclasses.replace(buffers[0], bytes=sum(b.bytes for b in buffers), saves=saves)


def dearest_ops(roofline: Roofline, most: int) -> list[Op]:
    """Operations by what they add to the step; those of different layers that are alike count as one."""
    alike = lambda op: (op.kind, op.direction, op.module, op.source, op.bound, op.by, work(op))  # noqa: E731
    merged = [
        _merged(ops, ("flops", "bytes", "seconds", "exposed"))
        for ops in _grouped(roofline.ops, alike)
    ]
    return sorted(merged, key=lambda op: -op.exposed * op.times)[:most]


def dearest_exchanges(roofline: Roofline, most: int | None = None) -> list[Exchange]:
    """By what they cost unhidden, then by what they cost at all; merged like operations."""
    merged = [
        _merged(same, ("seconds", "exposed"))
        for same in _grouped(roofline.exchanges, _ALIKE_EXCHANGES)
    ]
    cost = lambda e: (-e.exposed * e.times, -e.seconds * e.times)  # noqa: E731
    return sorted(merged, key=cost)[:most]


def _grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = collections.defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def _merged(items: Sequence[Any], means: Sequence[str]) -> Any:
    """One for all: runs in a step add up, `means` are those of a run."""
    times = sum(item.times for item in items)
    each = {name: sum(getattr(i, name) * i.times for i in items) / (times or 1) for name in means}
    return dataclasses.replace(items[0], times=times, **each)


def ranking(plans: Sequence[Plan]) -> list[dict[str, str]]:
    """One row per plan, column to text; columns that no plan fills are left out.

    Plans by arithmetic carry a "~" before what they estimate.
    """
    rows = [_ranking_row(plan) for plan in plans]
    used = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def labels(plans: Sequence[Plan]) -> list[str]:
    """What tells plans apart, of target, mesh and what a search may change; numbered where nothing does."""
    rows = [_ranking_row(plan) for plan in plans]
    known = {"target": "{}", "mesh": "{}", "rules": "rules {}", "remat": "remat {}",
             "micro": "{} microbatches"}  # fmt: skip
    telling = [name for name in known if len({row[name] for row in rows}) > 1]
    said = [
        ", ".join(known[name].format(row[name]) for name in telling if row[name]) for row in rows
    ]
    if len(set(said)) == len(said) and all(said):
        return said
    return [
        f"{number}: {text or plan.target}"
        for number, (text, plan) in enumerate(zip(said, plans, strict=True), 1)
    ]


def _ranking_row(plan: Plan) -> dict[str, str]:
    time, cost, about = plan.roofline, plan.cost, "~" if plan.estimated else ""
    rules = plan.config.get("mesh", {}).get("rules", "default")
    accumulate = plan.config.get("train", {}).get("accumulate_steps", 1)
    return {
        "target": plan.target,
        "chips": f"{plan.num_chips:,}",
        "mesh": mesh_sizes(plan.mesh),
        "rules": "" if rules == "default" else rules,
        "remat": str(plan.config.get("model", {}).get("remat") or ""),
        "micro": f"{accumulate}" if accumulate > 1 else "",
        "fits": "yes" if plan.fits else "no",
        "peak GiB": about + gib(plan.memory.peak),
        "step": about + duration(time.step_seconds) if time else "",
        "tok/s/chip": f"{about}{time.tokens_per_second:,.0f}" if time else "",
        "MFU": percent(time.mfu) if time and time.mfu is not None else "",
        "bound": binding(time)[0].removeprefix("communication ") if time else "",
        "days": number(cost.days) if cost else "",
        "dollars": money(cost.dollars) if cost and cost.dollars is not None else "",
    }
