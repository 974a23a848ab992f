"""The time of one training step, from the scheduled program that the compiler made of it.

schedule.py says how long each instruction takes and what hides it. The time of a step is the sum
of what is exposed, divided by the generation's `EFFICIENCY`, the one number that stands for what
no estimate has.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping

from llm_jax.planner.chips import Chip
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.plan import Roofline
from llm_jax.planner.schedule import Schedule, read_schedule

# Measured over predicted speed, one number for a generation, 1 where none is given. The published runs
# of docs/planner.md need none.
EFFICIENCY: Mapping[str, float] = {}


def read_roofline(
    step: CompiledStep, chip: Chip, efficiency: float | None = None
) -> Roofline | None:
    """The time of the step on its chips.

    Args:
      efficiency: instead of EFFICIENCY's for this chip.

    Returns:
      None for a chip whose peak or memory rate is unknown, as a CPU's are, and without a text.
    """
    if not step.hlo or not chip.peak_flops or not chip.hbm_bytes_per_second:
        return None
    if efficiency is None:
        efficiency = EFFICIENCY.get(chip.name, 1.0)
    found = read_schedule(step, chip)
    slower = lambda one: dataclasses.replace(  # noqa: E731
        one, seconds=one.seconds / efficiency, exposed=one.exposed / efficiency
    )
    ops, exchanges = map(slower, found.ops), map(slower, found.exchanges)
    slowed = Schedule(tuple(ops), tuple(exchanges), found.unknown_loops)
    return _summary(step, chip, slowed, efficiency)


def _summary(step: CompiledStep, chip: Chip, schedule: Schedule, efficiency: float) -> Roofline:
    ops = schedule.ops
    bounds: collections.Counter[str] = collections.Counter()
    for op in ops:
        bounds[op.bound] += op.exposed * op.times
    total = math.fsum(bounds.values())
    chips = max(1, math.prod(axis.size for axis in step.mesh) // chip.devices)
    rate = step.tokens_per_step / total / chips if total else 0.0
    share = lambda name: rate * step.model_flops[name] / chip.peak_flops  # noqa: E731
    full = step.model_flops.get("full")
    by_compiler = math.fsum(op.exposed * op.times for op in ops if op.by == "compiler")
    return Roofline(
        step_seconds=total,
        bounds={name: value for name, value in bounds.most_common() if value > 0},
        ops=ops,
        exchanges=schedule.exchanges,
        tokens_per_second=rate,
        model_flops=None if full is None else full * step.tokens_per_step / chips,
        hardware_flops=math.fsum(op.flops * op.times for op in ops),
        mfu=None if full is None else share("full"),
        mfu_causal=share("causal") if "causal" in step.model_flops else None,
        efficiency=efficiency,
        from_compiler=by_compiler / total if total else 0.0,
        unknown_loops=schedule.unknown_loops,
    )
