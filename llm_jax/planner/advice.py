"""What to change when memory is short: for each large array, and for a step that does not fit.

The changes and their arithmetic are in changes.py; here the smallest that helps is chosen.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from llm_jax.planner.changes import Change, changes_for
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.plan import Finding, LiveBuffer, Memory, Roofline
from llm_jax.planner.words import size

# Arrays for which a change is looked for.
LARGEST = 10
# Of the peak, better saved besides: recomputation works with arrays of its own, and the peak may move to
# another moment. Three changes that were compiled saved 2 to 7 % of the peak less than by arithmetic.
_MARGIN = 0.05
# The share of a step from which communication counts as its trouble, and what microbatches do then.
_MUCH_COMMUNICATION = 0.25
_OF_COMMUNICATION = 30


def advise(
    step: CompiledStep, memory: Memory, roofline: Roofline | None, capacity: int
) -> tuple[Memory, tuple[Finding, ...]]:
    """The memory with changes noted for its largest arrays; findings where the step does not fit, and
    on what it keeps in host memory.

    Args:
      roofline: where communication takes much of it, more microbatches are the last resort: each
        gathers and reduces the weights again.
      capacity: bytes of a chip; where the compiler said that it had less, that counts.
    """
    changes = changes_for(step, memory.buffers)
    if roofline is not None and _communicates(roofline):
        changes = [_harder(change) for change in changes]
    buffers = [
        _with_change(buffer, index, changes) if index < LARGEST else buffer
        for index, buffer in enumerate(memory.buffers)
    ]
    advised = dataclasses.replace(memory, buffers=tuple(buffers))
    missing = memory.peak - min(capacity, memory.capacity)
    findings = (_does_not_fit(memory, changes, missing),) if missing > 0 else ()
    return advised, (*findings, *_on_the_host(memory))


def _with_change(buffer: LiveBuffer, index: int, changes: Sequence[Change]) -> LiveBuffer:
    """The buffer with the least harmful change that makes it smaller."""
    helping = (c for c in changes if buffer.part in c.for_parts and c.saves[index] > 0)
    best = min(helping, key=lambda c: (_order(buffer, c), c.harm), default=None)
    if best is None:
        return buffer
    return dataclasses.replace(buffer, change=best.override, saves=best.saves[index])


def _order(buffer: LiveBuffer, change: Change) -> bool:
    """What the forward pass keeps is a matter of remat first, though microbatches may cost less."""
    recomputes = change.keys == {"model.remat"} and change.override != "model.remat=offload"
    return buffer.part == "activations" and not recomputes


def _communicates(roofline: Roofline) -> bool:
    exposed = sum(
        seconds
        for name, seconds in roofline.bounds.items()
        if name.startswith("communication") and name != "communication host"
    )
    return exposed > _MUCH_COMMUNICATION * roofline.step_seconds


def _harder(change: Change) -> Change:
    if "train.accumulate_steps" not in change.keys:
        return change
    return dataclasses.replace(change, harm=change.harm + _OF_COMMUNICATION)


def _on_the_host(memory: Memory) -> Iterator[Finding]:
    if memory.host:
        text = (
            f"{size(memory.host)} per chip are pinned in the memory of its host, which must have as much "
            "for each of its chips"
        )
        yield Finding("note", text, bytes=memory.host)


def _does_not_fit(memory: Memory, changes: Sequence[Change], missing: int) -> Finding:
    devices = _devices_per_chip(memory)
    head = (
        f"does not fit: {size(memory.peak)} of {size(memory.peak - missing)}, "
        f"{size(missing)} too much"
    )
    for margin in (int(_MARGIN * memory.peak), 0):
        chosen = _enough(memory, changes, (missing + margin) / devices)
        if chosen:
            saved = _saved(memory, chosen) * devices
            override = " ".join(change.override for change in chosen)
            text = f"{head}; {override} saves about {size(saved)}"
            return Finding("memory", text, bytes=missing, change=override)
    times = math.ceil(memory.peak / (memory.peak - missing))
    text = (
        f"{head}; no one or two changes of remat, microbatches or mesh save as much: take at least "
        f"{times} times the chips, or a smaller model"
    )
    return Finding("memory", text, bytes=missing)


def _enough(memory: Memory, changes: Sequence[Change], missing: float) -> tuple[Change, ...] | None:
    """The least harmful change that saves so much per device, or pair where no single one does."""
    singles = ((change,) for change in changes)
    pairs = (pair for pair in itertools.combinations(changes, 2) if not pair[0].keys & pair[1].keys)
    harm = lambda chosen: sum(change.harm for change in chosen)  # noqa: E731
    for group in (singles, pairs):
        enough = [chosen for chosen in group if _saved(memory, chosen) >= missing]
        if enough:
            return min(enough, key=harm)
    return None


def _saved(memory: Memory, changes: Sequence[Change]) -> int:
    """Bytes per device; two changes of one array take their shares one after the other."""
    saved = -sum(change.costs for change in changes)
    for index, buffer in enumerate(memory.buffers):
        left = float(buffer.bytes)
        for change in changes:
            left *= 1 - change.saves[index] / buffer.bytes if buffer.bytes else 1
        saved += buffer.bytes - int(left)
    return saved


def _devices_per_chip(memory: Memory) -> int:
    """Parts are per chip and buffers per device."""
    of_one = sum(b.bytes for b in memory.buffers if b.part == "parameters")
    return max(1, round(memory.parts["parameters"] / of_one)) if of_one else 1
