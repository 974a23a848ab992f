"""Which choices a search compiles next.

Arithmetic scores every choice of space.py once. What the compiler then says of one corrects the
estimates of those like it, so a strategy that turned out larger or slower falls back with all its kin.
In the first half every generation, slice and strategy gets its turn, the most promising first; then whatever
promises to beat the best. What misses memory is no answer: its kin with more microbatches come next, and
where no estimate is left that fits, the smallest.
"""

import collections
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from llm_jax.core.config import ConfigError
from llm_jax.planner.estimate import estimate
from llm_jax.planner.footprint import footprint
from llm_jax.planner.pace import pace
from llm_jax.planner.placement import Placement, pipeline_turns, place
from llm_jax.planner.plan import Plan
from llm_jax.planner.space import (
    Overrides,
    accumulations,
    meshes,
    overrides_of,
    policies,
    summary_of,
    with_choice,
)
from llm_jax.planner.topology import Target
from llm_jax.training.config import RunConfig

Objective = Literal["time", "cost"]

# How far an estimate may lie above the memory of a chip and still come to the compiler's notice.
_HOPE = 1.25
# A choice must promise so much of the best score, or less, to be worth a compile: at first, and later.
# Estimates of neighbours are good to a few percent.
_NEAR, _WORTH = 1.3, 1.08
# Failed answers after which a target is given up.
_PATIENCE = 3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One choice. peak: bytes per chip, and seconds of a step, both estimated."""

    target: Target
    run: RunConfig
    peak: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.target.chip.hbm_bytes

    @property
    def overrides(self) -> Overrides:
        return overrides_of(self.run)

    @property
    def summary(self) -> str:
        return summary_of(self.run)

    def estimate(self, tokens: float | None = None, price: float | None = None) -> Plan:
        return estimate(self.run, self.target, tokens=tokens, price=price)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was tried.

    plan: by the compiler, or an estimate for GPUs that are not here. None where the compiler failed;
    `why` is then its line. quick: compiled with other options than training sets.
    """

    candidate: Candidate
    plan: Plan | None
    why: str = ""
    quick: bool = False

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits and self.plan.roofline is not None


def score(objective: Objective, target: Target, seconds: float, price: float | None) -> float:
    """Seconds of a step, or its dollars; chip-hours where the price is zero."""
    if objective == "time":
        return seconds
    hourly = target.chip.dollars_per_chip_hour if price is None else price
    return seconds * target.num_chips * (hourly or 1.0) / 3600


class Hunt:
    """Candidates and trials.

    considered: choices in all; pruned: those that arithmetic dropped, by reason; without: a line for
    each target without a trial where nothing fits by arithmetic.
    """

    def __init__(self, objective: Objective, price: float | None, compiles: int):
        self.objective, self.price, self.compiles = objective, price, compiles
        self.trials: list[Trial] = []
        self.considered = 0
        self.pruned: collections.Counter[str] = collections.Counter()
        self.without: list[str] = []
        self._candidates: list[Candidate] = []  # those that `next` has not given yet
        self._hopeless: dict[Target, str] = {}

    def add(self, run: RunConfig, target: Target) -> None:
        """Scores all choices on a target."""
        smallest, refusal = None, ""
        for mesh in meshes(run, target):
            base: Placement | None = None
            kept = policies(mesh)
            for steps in accumulations(run):
                self.considered += len(kept)
                choice = with_choice(run, mesh, kept[0], steps)
                try:
                    base = place(choice, target) if base is None else _accumulating(base, choice)
                    found = [
                        _candidate(with_choice(run, mesh, remat, steps), base) for remat in kept
                    ]
                except ConfigError as error:
                    self.pruned["cannot be sharded"] += len(kept)
                    refusal = refusal or str(error)
                    continue
                for candidate in found:
                    if smallest is None or candidate.peak < smallest:
                        smallest = candidate.peak
                    if candidate.peak <= _HOPE * target.chip.hbm_bytes:
                        self._candidates.append(candidate)
                    else:
                        self.pruned["memory"] += 1
        if smallest is None:
            self._hopeless[target] = (
                f"{target.name}: nothing can be sharded over its {target.num_chips} chips: {refusal}"
            )
        elif smallest > target.chip.hbm_bytes:
            self._hopeless[target] = _nothing_fits(target, smallest)

    def next(self, count: int) -> list[Candidate]:
        """Up to `count` candidates to compile now; none where nothing is worth it.

        In the first half of the compiles, what is most unlike those before goes first.
        """
        picked: list[Candidate] = []
        exploring = len(self.trials) < (self.compiles + 1) // 2
        promising = list(self._promising(exploring))
        for look in (_chip, _target, _strategy, _mesh, _policy) if exploring else (_policy,):
            # More microbatches may cure a mesh or a policy that missed memory.
            curable = look in (_mesh, _policy)
            known = [t.candidate for t in self.trials if t.fits or not curable]
            seen = {look(c) for c in (*known, *picked)}
            for candidate in promising:
                if len(picked) < count and look(candidate) not in seen:
                    picked.append(candidate)
                    seen.add(look(candidate))
        self._candidates = [c for c in self._candidates if not any(c is p for p in picked)]
        return picked

    def settle(self, target: Target, tokens: float | None) -> None:
        """The answer for a target without a trial: for GPUs an estimate; else why nothing fits."""
        if any(trial.candidate.target == target for trial in self.trials):
            return
        if target in self._hopeless:
            self.without.append(self._hopeless[target])
        elif target.kind == "gpu":
            mine = [c for c in self._candidates if c.target == target and c.fits]
            best = min(mine, key=lambda c: c.seconds, default=None)
            if best is not None:
                self.trials.append(Trial(best, best.estimate(tokens, self.price), "estimated"))

    def ranked(self) -> tuple[Trial, ...]:
        """The best first, then those that do not fit, then those that failed."""
        return tuple(
            sorted(self.trials, key=lambda t: (not t.fits, t.plan is None, self._measured(t)))
        )

    def _promising(self, exploring: bool) -> Iterator[Candidate]:
        """What is likely to fit and to beat the best, or to come near, by corrected estimates.

        Of GPUs nothing is compiled.
        """
        memory, pace = self._corrections()
        expected = lambda c: score(  # noqa: E731
            self.objective, c.target, c.seconds * pace.get(_strategy(c), 1.0), self.price
        )
        candidates = [c for c in self._candidates if c.target.kind == "tpu"]
        ranked = [
            c
            for c in sorted(candidates, key=expected)
            if c.peak * memory.get(_strategy(c), memory.get(_chip(c), 1.0))
            <= c.target.chip.hbm_bytes
        ]
        best = min((self._measured(t) for t in self.trials if t.fits), default=None)
        if best is None and ranked:
            best = expected(ranked[0])
        # Each slice that was named gets an answer; of many, each generation.
        each = _target if 2 * len({c.target for c in ranked}) <= self.compiles else _chip
        answered = {each(t.candidate) for t in self.trials if t.fits}
        failures = collections.Counter(each(t.candidate) for t in self.trials if not t.fits)
        for candidate in ranked:
            key = each(candidate)
            wanted = key not in answered and failures[key] < _PATIENCE
            if wanted or expected(candidate) <= (_NEAR if exploring else _WORTH) * best:
                yield candidate
        # Corrections err too: what has no answer and no estimate left that fits tries its smallest.
        closed = answered | {each(c) for c in ranked}
        unanswered = [c for c in candidates if each(c) not in closed]
        for candidate in sorted(unanswered, key=lambda c: c.peak):
            if best is None or failures[each(candidate)] < _PATIENCE:
                yield candidate

    def _measured(self, trial: Trial) -> float:
        if not trial.fits:
            return float("inf")
        seconds = trial.plan.roofline.step_seconds
        return score(self.objective, trial.candidate.target, seconds, self.price)

    def _corrections(self) -> tuple[Mapping[Any, float], Mapping[Any, float]]:
        """Of memory and of time: compiled over estimated, the median of the trials of a strategy.

        Of memory also by chip, for strategies that no trial had; what is unknown of their time is an
        invitation.
        """
        memory, pace = (collections.defaultdict(list) for _ in range(2))
        for trial in self.trials:
            candidate, plan = trial.candidate, trial.plan
            if plan is not None:
                for key in (_strategy(candidate), _chip(candidate)):
                    memory[key].append(plan.memory.peak / candidate.peak)
            if trial.fits:
                ratio = plan.roofline.step_seconds / candidate.seconds
                pace[_strategy(candidate)].append(ratio)
        medians = lambda ratios: {k: statistics.median(r) for k, r in ratios.items()}  # noqa: E731
        return medians(memory), medians(pace)


def _chip(candidate: Candidate) -> str:
    return candidate.target.chip.name


def _target(candidate: Candidate) -> Target:
    return candidate.target


def _strategy(candidate: Candidate) -> tuple:
    """The target, the axes that take part besides data and fsdp, and whether parameters are whole."""
    mesh = candidate.run.mesh
    axes = [a for a in ("pipeline", "expert", "context", "tensor") if getattr(mesh, a) > 1]
    pipelined = mesh.dcn.pipeline > 1
    return candidate.target, *axes, pipelined, mesh.rules == "zero1"


def _mesh(candidate: Candidate) -> tuple:
    return candidate.target, candidate.run.mesh


def _policy(candidate: Candidate) -> tuple:
    return *_mesh(candidate), candidate.run.model.remat


def _candidate(run: RunConfig, placement: Placement) -> Candidate:
    seconds = pace(run, placement).step_seconds
    return Candidate(placement.target, run, footprint(run, placement).peak, seconds)


def _accumulating(placement: Placement, run: RunConfig) -> Placement:
    """The same mesh with other microbatches.

    Raises:
      ConfigError: their rows do not divide over it.
    """
    if run.train.microbatch_size % placement.shares("batch"):
        raise ConfigError("rows do not divide")
    if placement.shares("stage") == 1:
        return placement
    try:
        items, turns = pipeline_turns(run, placement.rules)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return dataclasses.replace(placement, items=items, turns=turns)


def _nothing_fits(target: Target, smallest: int) -> str:
    gib = 2**30
    return (
        f"{target.name}: nothing fits; the smallest choice needs about {smallest / gib:.1f} GiB of "
        f"{target.chip.hbm_bytes / gib:.1f} per chip"
    )
