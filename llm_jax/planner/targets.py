"""One run on several targets: compiled a few at a time, or estimated where there is no compiler."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.data.progress import Progress
from llm_jax.planner import words
from llm_jax.planner.compile import CompileError, Request, compile_many
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.estimate import estimate, with_cure
from llm_jax.planner.make import make_plan
from llm_jax.planner.plan import Plan
from llm_jax.planner.topology import Target, parse_target
from llm_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Answers:
    """plans: in the order asked for. failures: why others have none, by target.

    interrupted: by Ctrl-C; plans are those that were made until then.
    """

    plans: tuple[Plan, ...]
    failures: dict[str, Exception]
    interrupted: bool


def plan_targets(
    run: RunConfig,
    names: Sequence[str],
    *,
    jobs: int,
    cache: Path | None,
    progress: Progress,
    tokens: float | None = None,
    price: float | None = None,
) -> Answers:
    """Plans a run on each target.

    Args:
      names: as topology.parse_target takes them.
      jobs: compilations at a time.
      cache: as of compile.compile_step.
      tokens, price: as of make.make_plan.

    Raises:
      ConfigError: an unknown target.
    """
    targets = {name: parse_target(name) for name in names}
    plans, failures = _estimated(run, targets, tokens, price)
    interrupted = False
    requests = [Request(to_dict(run), name) for name in targets if targets[name].kind != "gpu"]
    try:
        for name, step in _compiled(requests, jobs, cache, progress):
            if isinstance(step, Exception):
                failures[name] = step
                continue
            plans[name] = make_plan(step, targets[name], tokens=tokens, price=price)
            if len(targets) > 1:
                progress.say(f"{name}: {words.verdict(plans[name])}")
    except KeyboardInterrupt:
        interrupted = True
    ordered = tuple(plans[name] for name in targets if name in plans)
    return Answers(ordered, failures, interrupted)


def _estimated(
    run: RunConfig, targets: Mapping[str, Target], tokens: float | None, price: float | None
) -> tuple[dict[str, Plan], dict[str, Exception]]:
    """The plans of GPUs by name, and why others have none."""
    plans: dict[str, Plan] = {}
    failures: dict[str, Exception] = {}
    for name, target in targets.items():
        if target.kind == "gpu":
            try:
                plan = estimate(run, target, tokens=tokens, price=price)
                plans[name] = with_cure(plan, run, target)
            except ConfigError as error:
                failures[name] = error
    return plans, failures


def _compiled(
    requests: Sequence[Request], jobs: int, cache: Path | None, progress: Progress
) -> Iterator[tuple[str, CompiledStep | CompileError]]:
    """Each target's step, or why there is none, as it ends."""
    if not requests:
        return
    what = requests[0].target if len(requests) == 1 else f"{len(requests)} targets"
    progress.start(f"compiling for {what}", len(requests))
    try:
        for request, step in compile_many(requests, jobs, cache):
            progress.advance(1)
            yield request.target, step
    finally:
        progress.finish()
