"""A plan by arithmetic alone: for the search, and for GPUs that are not there.

No compiler, no devices, milliseconds. Memory is that of footprint.py, time that of pace.py; what cannot
be sharded is refused in the words of training (placement.py).
"""

import dataclasses
import time
from collections.abc import Iterator

import jax

from llm_jax.core.config import ConfigError, set_override, to_dict
from llm_jax.planner.cost import cost_of
from llm_jax.planner.footprint import footprint
from llm_jax.planner.pace import pace
from llm_jax.planner.placement import place
from llm_jax.planner.plan import Finding, Plan
from llm_jax.planner.stacks import is_known
from llm_jax.planner.topology import Target
from llm_jax.planner.words import excess, size
from llm_jax.training.config import RunConfig, resolve

NOTE = Finding(
    "note",
    "an estimate by arithmetic, without a compiler: memory within 25 %, time for comparing meshes",
)


def estimate(
    run: RunConfig, target: Target, *, tokens: float | None = None, price: float | None = None
) -> Plan:
    """The plan of a run on a target; `estimated` is set, and there are no ops and no buffers.

    Args:
      tokens, price: as of planner.make.make_plan.

    Raises:
      ConfigError: the run cannot be sharded over the target, its model is no transformer, or the
        target is "local".
    """
    if not is_known(run.model):
        raise ConfigError(f"config.model.name {run.model.name!r}: estimates know transformers only")
    if target.chip is None:
        raise ConfigError(f"topology {target.name!r}: devices that are there are compiled for")
    start = time.perf_counter()
    placement = place(run, target)
    memory, roofline = footprint(run, placement), pace(run, placement)
    cost = None
    if tokens is not None and roofline is not None:
        rate = roofline.tokens_per_second
        cost = cost_of(tokens, rate, target.num_chips, target.chip, price)
    return Plan(
        target=target.name,
        chip=target.chip.name,
        num_chips=target.num_chips,
        estimated=True,
        config=to_dict(run),
        mesh=dict(placement.mesh.shape),
        num_params=placement.num_params,
        tokens_per_step=run.train.batch_size * run.data.sequence_length,
        memory=memory,
        roofline=roofline,
        findings=(NOTE,),
        cost=cost,
        versions={"jax": jax.__version__},
        seconds={"estimate": time.perf_counter() - start},
        host_peak_bytes=0,
    )


def with_cure(plan: Plan, run: RunConfig, target: Target) -> Plan:
    """A plan that does not fit, with the mildest change of remat or microbatches that would.

    Its time is left out, as that of a step which the compiler refuses.
    """
    if plan.fits:
        return plan
    missing = plan.memory.peak - plan.memory.capacity
    head = f"does not fit: {size(plan.memory.peak)} of {size(plan.memory.capacity)}"
    head += f", {excess(plan.memory)} over"
    text = f"{head}; no count of microbatches does, with full remat either: take more chips"
    found = Finding("memory", text, bytes=missing)
    for overrides in _milder_first(run):
        config = to_dict(run)
        for override in overrides:
            set_override(config, override)
        try:
            changed = resolve(config)
            memory = footprint(changed, place(changed, target))
        except ConfigError:
            continue
        if memory.fits:
            change = " ".join(overrides)
            text = f"{head}; with {change} {size(memory.peak)}, by arithmetic"
            found = Finding("memory", text, bytes=missing, change=change)
            break
    return dataclasses.replace(plan, roofline=None, cost=None, findings=(found, *plan.findings))


def _milder_first(run: RunConfig) -> Iterator[tuple[str, ...]]:
    remat = () if run.model.remat in ("full", "offload") else ("model.remat=full",)
    steps, most = run.train.accumulate_steps, run.train.batch_size
    counts = [n for n in range(2 * steps, most + 1) if most % n == 0 and n % steps == 0]
    if remat:
        yield remat
    for count in counts:
        microbatches = f"train.accumulate_steps={count}"
        yield (microbatches,)
        if remat:
            yield (*remat, microbatches)
