"""The search for the fastest or the cheapest way to train a config on some slices.

Arithmetic drops what cannot be sharded or is far from fitting, the compiler judges the best of the rest
(hunt.py), and every answer is kept in the cache, so a second search goes on where the first one ended.
"""

import collections
import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.data.progress import Progress, Silent
from llm_jax.planner import words
from llm_jax.planner.compile import Request, compile_many
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.hunt import Candidate, Hunt, Objective, Trial, score
from llm_jax.planner.make import make_plan
from llm_jax.planner.plan import Cost, Plan
from llm_jax.planner.stacks import is_known
from llm_jax.planner.topology import Slices, Target, libtpu_version, parse_slices, parse_target
from llm_jax.sharding.xla_flags import quick_options
from llm_jax.training.config import RunConfig

# How many of the best are compiled again with the options that training sets: the others are told from
# each other with less of the chip's own memory for a fusion, which compiles faster.
FINALISTS = 2
# What a ranking by cost tells the cost of where no number is given: dollars per token rank as those of a
# step do, the tokens of a step being the same.
TOKENS = 1e9


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """trials: the best first, then those that do not fit, then those that failed.

    considered: choices in all; pruned: how many of them arithmetic dropped, by reason ("cannot be sharded",
    "memory"). without: a line for each target where nothing fits by arithmetic, or that has no price. price: dollars per
    chip-hour, None for list prices. interrupted: by Ctrl-C; trials are what was there.
    """

    objective: Objective
    trials: tuple[Trial, ...]
    considered: int
    pruned: Mapping[str, int]
    without: tuple[str, ...]
    price: float | None
    seconds: float
    interrupted: bool

    @classmethod
    def of(cls, hunt: Hunt, seconds: float, interrupted: bool) -> "SearchResult":
        return cls(
            objective=hunt.objective,
            trials=hunt.ranked(),
            considered=hunt.considered,
            pruned=dict(hunt.pruned),
            without=tuple(hunt.without),
            price=hunt.price,
            seconds=seconds,
            interrupted=interrupted,
        )

    @property
    def winner(self) -> Trial | None:
        return self.trials[0] if self.trials and self.trials[0].fits else None

    def score(self, trial: Trial) -> float:
        """Seconds of a step, or its dollars; of a trial that fits."""
        seconds = trial.plan.roofline.step_seconds
        return score(self.objective, trial.candidate.target, seconds, self.price)


def search(
    run: RunConfig,
    targets: Sequence[str],
    *,
    compiles: int,
    objective: Objective = "time",
    jobs: int = 2,
    cache: Path | None = None,
    progress: Progress | None = None,
    tokens: float | None = None,
    price: float | None = None,
) -> SearchResult:
    """Tries the most promising choices on all targets together.

    Ctrl-C ends it early: the result is then what was there.

    Args:
      targets: names of slices, or of GPUs, which are only estimated; two of the same count once.
      compiles: the most steps to compile over all targets, before the best of them are compiled once
        more, as they would train; those that the cache recalls count too.
      jobs: at a time.
      cache: as of planner.compile.compile_step.
      tokens, price: as of planner.make.make_plan; by cost, tokens are TOKENS where none are given.

    Raises:
      ConfigError: an unknown target, a model that estimates do not know, libtpu missing, or a cost asked
        for where no price is known.
    """
    start, progress = time.perf_counter(), progress or Silent()
    parsed = _checked(run, targets, objective, price)
    hunt, interrupted = Hunt(objective, price, compiles), False
    tokens = TOKENS if objective == "cost" and tokens is None else tokens
    try:
        try:
            _estimate(hunt, run, parsed, progress)
            if any(target.kind == "tpu" for target in parsed):
                _compile(hunt, jobs, cache, progress, tokens)
                _confirm(hunt, jobs, cache, progress, tokens)
        finally:  # inside of the other try: a second Ctrl-C keeps the table too
            for target in parsed:
                hunt.settle(target, tokens)
    except KeyboardInterrupt:
        interrupted = True
    return SearchResult.of(hunt, time.perf_counter() - start, interrupted)


def _checked(
    run: RunConfig, targets: Sequence[str], objective: Objective, price: float | None
) -> list[Target]:
    if not is_known(run.model):
        raise ConfigError(f"config.model.name {run.model.name!r}: a search knows transformers only")
    parsed = [parse_target(name) for name in dict.fromkeys(targets)]
    for target in parsed:
        if target.chip is None or target.chip.peak_flops is None:
            raise ConfigError(f"topology {target.name!r}: a search needs names of slices: v5e:4x4")
    if objective == "cost" and not any(_has_price(target, price) for target in parsed):
        raise ConfigError(f"topology {parsed[0].name!r}: no price is known to rank by; give one")
    if any(target.kind == "tpu" for target in parsed):
        libtpu_version()
    unlike: dict[Slices | Target, Target] = {}
    for target in parsed:
        unlike.setdefault(_meaning(target), target)
    return list(unlike.values())


def _meaning(target: Target) -> Slices | Target:
    """What a target is, however it is spelled: v5e-16 is v5e:4x4."""
    meant = parse_slices(target.name) if target.kind == "tpu" else target
    return dataclasses.replace(meant, name="")


def _estimate(hunt: Hunt, run: RunConfig, targets: list[Target], progress: Progress) -> None:
    progress.start("estimating, targets", len(targets))
    try:
        for target in targets:
            if hunt.objective == "time" or _has_price(target, hunt.price):
                hunt.add(run, target)
            else:
                hunt.without.append(f"{target.name}: no price is known to rank by; give one")
            progress.advance(1)
    finally:
        progress.finish()


def _has_price(target: Target, price: float | None) -> bool:
    return price is not None or target.chip.dollars_per_chip_hour is not None


def _compile(
    hunt: Hunt, jobs: int, cache: Path | None, progress: Progress, tokens: float | None
) -> None:
    progress.start("compiling the most promising", hunt.compiles)
    try:
        while batch := hunt.next(min(jobs, hunt.compiles - len(hunt.trials))):
            asked = [(_request(c, quick=True), c) for c in batch]
            for request, answer in compile_many([r for r, _ in asked], jobs, cache):
                candidate = next(c for r, c in asked if r is request)
                trial = _trial(candidate, answer, tokens, hunt.price, quick=bool(request.options))
                hunt.trials.append(trial)
                progress.say(line_of(trial))
                progress.advance(1)
    finally:
        progress.finish()


def _confirm(
    hunt: Hunt, jobs: int, cache: Path | None, progress: Progress, tokens: float | None
) -> None:
    """Compiles the best again, with the options that training sets, until none of the best is quick.

    One that fails or does not fit then makes room for the next.
    """
    while asked := [(_request(t.candidate, quick=False), t) for t in _best(hunt) if t.quick]:
        progress.start("compiling the best as they would train", len(asked))
        try:
            for request, answer in compile_many([r for r, _ in asked], jobs, cache):
                trial = next(t for r, t in asked if r is request)
                sure = _trial(trial.candidate, answer, tokens, hunt.price, quick=False)
                hunt.trials[hunt.trials.index(trial)] = sure
                progress.say(line_of(sure))
                progress.advance(1)
        finally:
            progress.finish()


def _best(hunt: Hunt) -> list[Trial]:
    return [trial for trial in hunt.ranked() if trial.fits][:FINALISTS]


def _request(candidate: Candidate, *, quick: bool) -> Request:
    options = quick_options(candidate.target.chip.device_kinds) if quick else {}
    return Request(to_dict(candidate.run), candidate.target.name, options)


def _trial(
    candidate: Candidate,
    answer: CompiledStep | Exception,
    tokens: float | None,
    price: float | None,
    *,
    quick: bool,
) -> Trial:
    if isinstance(answer, Exception):
        return Trial(candidate, None, str(answer), quick)
    plan = make_plan(answer, candidate.target, tokens=tokens, price=price)
    # The texts of a compiled step are megabytes, and the cache has them.
    return Trial(candidate, dataclasses.replace(plan, step=None), quick=quick)


def line_of(trial: Trial) -> str:
    """`v5e:4x4: fsdp 16, remat full: 812 ms, 5.12 of 15.75 GiB`."""
    choice = f"{trial.candidate.target.name}: {trial.candidate.summary}"
    if trial.plan is None:
        return f"{choice}: {trial.why}"
    memory = trial.plan.memory
    held = f"{words.gib(memory.peak)} of {words.gib(memory.capacity)} GiB"
    if not trial.fits:
        return f"{choice}: does not fit, {held}, {words.excess(memory)} over"
    return f"{choice}: {words.duration(trial.plan.roofline.step_seconds)}, {held}"


def explain(result: SearchResult) -> list[str]:
    """Why the winner wins and the next one loses, a sentence each; what failed, and why."""
    failed = [trial for trial in result.trials if trial.plan is None]
    lines = [_coverage(result), *result.without, *(f"failed: {line_of(t)}" for t in failed)]
    winner = result.winner
    if winner is None:
        return [*lines, "no choice that was tried fits"]
    lines.append(f"best: {line_of(winner)}; {_bound(winner.plan)}")
    if result.objective == "cost":
        lines.append(_cost(winner.plan.cost))
    others = [trial for trial in result.trials[1:] if trial.fits]
    lines += [line for other in others[:1] for line in _comparison(result, "next", winner, other)]
    mesh = lambda trial: (trial.candidate.target, trial.candidate.run.mesh)  # noqa: E731
    elsewhere = next((trial for trial in others if mesh(trial) != mesh(winner)), None)
    if elsewhere is not None and elsewhere is not others[0]:
        lines += _comparison(result, "the best of another mesh", winner, elsewhere)
    for trial in result.trials:
        if trial.plan is not None and not trial.plan.fits:
            over = words.excess(trial.plan.memory)
            lines.append(f"{_name(trial)} would need {over} more memory than there is")
            break
    return lines


def _coverage(result: SearchResult) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.pruned.items()))
    text = f"{result.considered:,} choices, {len(result.trials)} tried"
    text += f"; pruned: {dropped}" if dropped else ""
    quick = sum(trial.quick and trial.fits for trial in result.trials)
    if quick:
        text += f"; {quick} of those tried compiled quickly, and 4 to 16 % slower for that"
    return text + ("; interrupted" if result.interrupted else "")


def _name(trial: Trial) -> str:
    return f"{trial.candidate.target.name} with {trial.candidate.summary}"


def _bound(plan: Plan) -> str:
    name, share = words.binding(plan.roofline)
    return f"{words.percent(share)} of the step is {name}"


def _cost(cost: Cost) -> str:
    """What a ranking by cost goes by; the price of nothing leaves chip-hours."""
    dollars = f"{words.money(cost.dollars)}, " if cost.dollars else ""
    spent = f"{dollars}{words.number(cost.chip_hours)} chip-hours"
    return (
        f"days and dollars are those of {words.amount(cost.tokens)} tokens: {spent} with the best"
    )


def _comparison(result: SearchResult, what: str, winner: Trial, other: Trial) -> list[str]:
    """Where another trial loses its time, and what it gains."""
    ours, theirs = result.score(winner), result.score(other)
    unit = "time" if result.objective == "time" else "cost"
    lines = [f"{what}: {_name(other)}, {100 * (theirs / ours - 1):.1f} % more {unit}"]
    bounds = [collections.Counter(trial.plan.roofline.bounds) for trial in (winner, other)]
    names = {name for bound in bounds for name in bound}
    changes = {name: bounds[1][name] - bounds[0][name] for name in names}
    step = winner.plan.roofline.step_seconds
    notable = sorted(
        ((name, change) for name, change in changes.items() if abs(change) > 0.005 * step),
        key=lambda item: -abs(item[1]),
    )
    spent = [f"{words.duration(change)} more on {name}" for name, change in notable if change > 0]
    saved = [f"{words.duration(-change)} less on {name}" for name, change in notable if change < 0]
    if not spent and other.plan.roofline.step_seconds > step:
        spent = ["a little more on everything" + (" else" if saved else "")]
    text = f"a step spends {', '.join(spent)}" if spent else "its steps are no slower"
    lines.append(text + (f", and {', '.join(saved)}" if saved else ""))
    peaks = [words.size(trial.plan.memory.peak) for trial in (winner, other)]
    lines.append(f"memory per chip: {peaks[1]}, and {peaks[0]} with the best")
    return lines


_CONFIG = '''r"""{base}, as a search would train it on {target}.

Purpose:  the mesh and the memory that were found best by {objective}, of those that were tried.
Hardware: {target}, {chips} chips.
Expect:   {expect}, by the planner.
Command:  python -m llm_jax.train --config {path} --workdir WORKDIR --data DATA
"""

from pathlib import Path

import ml_collections

from llm_jax.core.config import load

BASE = Path(__file__).parent / {relative}
OVERRIDES = (
{overrides}
)


def get_config() -> ml_collections.ConfigDict:
    return load({loaded}, OVERRIDES)
'''


# The first line of what `_CONFIG` makes.
_WRITTEN = re.compile(r'r""".+, as a search would train it on .+\.')


def check_place(path: Path) -> None:
    """Whether a config can be written there.

    Raises:
      ConfigError: path is no .py file in a folder that exists, or a file that no search wrote.
    """
    if path.suffix != ".py" or not path.parent.is_dir():
        raise ConfigError(f"config file {path}: expected a .py file in a folder that exists")
    if path.exists() and not _WRITTEN.match(path.read_text(errors="replace")):
        raise ConfigError(f"config file {path}: it exists and no search wrote it; name another one")


def write_config(
    path: Path, base: str, trial: Trial, *, also: Sequence[str] = (), objective: Objective = "time"
) -> None:
    """Writes a config file that is `base` with a trial's choice; it reads base each time.

    Args:
      base: the config file of the search, as `core.config.load` takes it.
      also: overrides that the search was started with, `section.key=value`.

    Raises:
      ConfigError: as `check_place`.
    """
    check_place(path)
    file, _, argument = base.partition(":")
    target = trial.candidate.target
    chosen = [f"{key}={value!r}" for key, value in trial.candidate.overrides.items()]
    path.write_text(
        _CONFIG.format(
            base=Path(file).name,
            target=target.name,
            objective=objective,
            chips=target.num_chips,
            expect=_expectation(trial),
            path=path,
            relative=json.dumps(os.path.relpath(Path(file).resolve(), path.parent.resolve())),
            overrides="\n".join(f"    {json.dumps(text)}," for text in [*also, *chosen]),
            loaded="str(BASE)" + (f" + {json.dumps(f':{argument}')}" if argument else ""),
        )
    )


def _expectation(trial: Trial) -> str:
    plan = trial.plan
    if plan is None or plan.roofline is None:
        return "not planned"
    roofline = plan.roofline
    mfu = "" if roofline.mfu is None else f" (MFU {words.percent(roofline.mfu)})"
    text = f"{words.duration(roofline.step_seconds)} a step{mfu}, {words.size(plan.memory.peak)} per chip"
    if plan.cost is not None:
        text += f"; {words.days(plan.cost.days)} for {words.amount(plan.cost.tokens)} tokens"
    return text
