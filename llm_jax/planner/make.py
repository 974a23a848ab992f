"""From what the compiler said to a plan: memory, time, communication, findings, cost."""

import dataclasses
import math
from collections.abc import Iterator

from llm_jax.planner.advice import advise
from llm_jax.planner.chips import Chip, chip_of
from llm_jax.planner.collectives import Namer, name_exchanges
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.cost import cost_of
from llm_jax.planner.lint import lint
from llm_jax.planner.logical import name_shapes
from llm_jax.planner.memory import read_memory
from llm_jax.planner.plan import Finding, Memory, Plan, Roofline
from llm_jax.planner.roofline import read_roofline
from llm_jax.planner.topology import Target


def make_plan(
    step: CompiledStep,
    target: Target,
    *,
    tokens: float | None = None,
    price: float | None = None,
) -> Plan:
    """Reads a compiled step, or one that does not fit.

    Args:
      tokens: to train on, for the cost; None leaves it out.
      price: dollars per chip-hour instead of the list price.
    """
    target = _resolved(target, step)
    chip = target.chip
    namer = Namer(step) if step.hlo else None
    memory = read_memory(step, chip.hbm_bytes, target.devices_per_chip)
    if namer is not None:
        memory = _with_lines(memory, namer)
    roofline = read_roofline(step, chip)
    if roofline is not None:
        roofline = name_exchanges(roofline, namer)
    memory, advice = advise(step, memory, roofline, chip.hbm_bytes)
    memory = name_shapes(memory, step)
    findings = advice if namer is None else (*advice, *lint(namer, roofline))
    findings += tuple(_left_out(roofline, chip))
    # Of a program that was never finished there are no cycles: its communication can be looked at,
    # its time not told.
    timed = None if step.out_of_memory else roofline
    plan = Plan(
        target=target.name,
        chip=chip.name,
        num_chips=target.num_chips,
        estimated=False,
        config=step.config,
        mesh={axis.name: axis.size for axis in step.mesh},
        num_params=step.num_params,
        tokens_per_step=step.tokens_per_step,
        memory=memory,
        roofline=timed,
        findings=findings,
        cost=None,
        versions=step.versions,
        seconds=step.seconds,
        host_peak_bytes=step.host_peak_bytes,
        step=step,
    )
    if tokens is None or timed is None:
        return plan
    cost = cost_of(tokens, timed.tokens_per_second, target.num_chips, chip, price)
    return dataclasses.replace(plan, cost=cost)


def _left_out(roofline: Roofline | None, chip: Chip) -> Iterator[Finding]:
    """What the time of a step does not have."""
    if roofline is None:
        return
    if roofline.exchanges and chip.link_bytes_per_second is None:
        text = f"the links of {chip.name} are in no table: collectives take no time in this plan"
        yield Finding("note", text)
    if roofline.unknown_loops:
        text = (
            f"loops in {', '.join(roofline.unknown_loops)} do not state how often they turn, and count "
            "once: a step takes longer than this plan says"
        )
        yield Finding("note", text)


def _with_lines(memory: Memory, namer: Namer) -> Memory:
    """Arguments are used somewhere, but made nowhere: they get the line of their first use."""
    arguments = {argument.name: argument for argument in namer.step.arguments}
    buffers = []
    for buffer in memory.buffers:
        argument = (
            arguments.get(buffer.op_name)
            or namer.parameters.get(f"params.{buffer.module}")
            or namer.frozen.get(f"extra.{buffer.module}")
        )
        if not buffer.source and argument is not None:
            buffer = dataclasses.replace(buffer, source=namer.source_of(argument))
        buffers.append(buffer)
    return dataclasses.replace(memory, buffers=tuple(buffers))


def _resolved(target: Target, step: CompiledStep) -> Target:
    """A target whose chips are those that the step was compiled for, where its name does not say."""
    if target.chip is not None:
        return target
    chip = chip_of(step.device_kind, step.device_memory, step.measured)
    devices = math.prod(axis.size for axis in step.mesh)
    return dataclasses.replace(target, chip=chip, num_chips=max(1, devices // chip.devices))
