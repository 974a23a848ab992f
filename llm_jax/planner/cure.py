"""What makes a step fit, tried: the advice of advice.py is arithmetic, and the compiler has the last word.

The advised change is compiled. Where it is not enough, what is advised then comes on top of it.
"""

import dataclasses
from collections.abc import Callable

from llm_jax.core.config import ConfigError, set_override, to_dict
from llm_jax.core.flags import RunError
from llm_jax.planner.plan import Finding, Plan
from llm_jax.planner.words import duration, excess, size
from llm_jax.training.config import RunConfig, resolve

MOST_TRIES = 3


def with_tried_cure(plan: Plan, run: RunConfig, replan: Callable[[RunConfig], Plan]) -> Plan:
    """A plan that does not fit, its advice replaced by what was found when it was followed.

    Args:
      replan: compiles a changed run for the same target; as it raises ConfigError, RunError or ValueError
        where it cannot, the advice stays what it was.
    """
    values: dict[str, str] = {}
    tried = plan
    for _ in range(MOST_TRIES):
        change = _advice(tried).change
        if change is None:
            break
        values |= dict(part.split("=", 1) for part in change.split())
        try:
            tried = replan(_changed(run, values))
        except (ConfigError, RunError, ValueError):
            return plan
        if tried.fits:
            break
    return plan if tried is plan else _told(plan, values, tried)


def _advice(plan: Plan) -> Finding:
    """Of a plan that does not fit."""
    return next(finding for finding in plan.findings if finding.kind == "memory")


def _changed(run: RunConfig, values: dict[str, str]) -> RunConfig:
    config = to_dict(run)
    for key, value in values.items():
        set_override(config, f"{key}={value}")
    return resolve(config)


def _told(plan: Plan, values: dict[str, str], tried: Plan) -> Plan:
    before, memory = _advice(plan), tried.memory
    head = before.text.partition(";")[0]
    override = " ".join(f"{key}={value}" for key, value in values.items())
    if not tried.fits:
        text = f"{head}; compiled with {override} it is still {excess(memory)} over"
        if _advice(tried).change is None:
            text += f", {_advice(tried).text.partition('; ')[2]}"
        found = dataclasses.replace(before, text=text, change=None)
    else:
        fits = f"it fits, {size(memory.peak)}"
        if tried.roofline is not None:
            fits += f", and takes {duration(tried.roofline.step_seconds)}"
        found = dataclasses.replace(
            before, text=f"{head}; compiled with {override} {fits}", change=override
        )
    findings = tuple(found if finding is before else finding for finding in plan.findings)
    return dataclasses.replace(plan, findings=findings)
