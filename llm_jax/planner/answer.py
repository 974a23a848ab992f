"""What is shown, written and returned for each way of asking for a plan."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_jax.core.config import load
from llm_jax.data.progress import make_progress
from llm_jax.planner import diff, search, words
from llm_jax.planner.cure import with_tried_cure
from llm_jax.planner.hunt import Objective
from llm_jax.planner.page import write_page
from llm_jax.planner.plan import Plan
from llm_jax.planner.revision import other_commit
from llm_jax.planner.space import default_targets
from llm_jax.planner.targets import Answers, plan_targets
from llm_jax.planner.terminal import show_plan, show_ranking
from llm_jax.training.config import RunConfig, resolve

FAILED, DOES_NOT_FIT, INTERRUPTED = 1, 2, 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """The flags of `python -m llm_jax.plan`, under their names; numbers have their defaults there.

    config: FILE[:ARGUMENT]; overrides: "section.key=value". json: "-" is standard output. None and
    empty are what was not asked.
    """

    config: str
    max_chips: int
    compiles: int
    jobs: int
    topology: Sequence[str] = ()
    overrides: Sequence[str] = ()
    tokens: float | None = None
    price: float | None = None
    search: bool = False
    rank: Objective = "time"
    write_config: Path | None = None
    compare: str | None = None
    max_increase: str = ""
    json: str | None = None
    html: Path | None = None
    cache: Path | None = None


def answer(question: Question) -> int:
    """Answers on the terminal and in the files asked for.

    Returns:
      The exit status: 0 where a plan fits, DOES_NOT_FIT, FAILED, INTERRUPTED.

    Raises:
      ConfigError, RunError: in one line, what keeps all of it from an answer.
    """
    ask = _search if question.search else _compare if question.compare else _report
    try:
        run = resolve(load(question.config, question.overrides))
        return ask(run, question, Console(stderr=question.json == "-"))
    except KeyboardInterrupt:
        return INTERRUPTED


def _report(run: RunConfig, question: Question, console: Console) -> int:
    """All about one target; of several a table."""
    answers = _answers(run, question)
    plans, failures = answers.plans, answers.failures
    alone = len(question.topology) == 1
    if alone and failures:
        raise failures[question.topology[0]]
    if alone and plans and not plans[0].fits and not plans[0].estimated:
        plans = (_cured(plans[0], run, question),)
    if plans or not answers.interrupted:
        content = [plan.to_dict() for plan in plans]
        _publish(question, content[0] if alone else {"plans": content}, plans)
    if not alone:
        show_ranking(plans, console)
    elif plans:
        show_plan(plans[0], console)
    for name, error in failures.items():
        print(f"error: {name}: {error}", file=sys.stderr)
    if answers.interrupted:
        answered = {*failures, *(plan.target for plan in plans)}
        missing = ", ".join(name for name in question.topology if name not in answered)
        print(f"stopped before there was an answer for {missing}", file=sys.stderr)
        return INTERRUPTED
    return FAILED if failures else _status(plans)


def _cured(plan: Plan, run: RunConfig, question: Question) -> Plan:
    make_progress().say(f"{plan.target} {words.verdict(plan)}; compiling what would make it fit")
    with contextlib.suppress(KeyboardInterrupt):  # the plan is there
        return with_tried_cure(plan, run, lambda changed: _plan(changed, question))
    return plan


def _search(run: RunConfig, question: Question, console: Console) -> int:
    """A table of what was tried, the best first, and why it is."""
    if question.write_config:
        search.check_place(question.write_config)
    names = question.topology or default_targets(question.max_chips)
    limits = {"compiles": question.compiles, "jobs": question.jobs, "cache": question.cache}
    result = search.search(
        run, names, objective=question.rank, progress=make_progress(), tokens=question.tokens,
        price=question.price, **limits,
    )  # fmt: skip
    plans = [trial.plan for trial in result.trials if trial.plan is not None]
    reasons = search.explain(result)
    show_ranking(plans, console)
    for line in reasons:
        console.print(line, markup=False, highlight=False)
    if question.write_config:
        _write_winner(question, result, console)
    if plans or not result.interrupted:
        content = {"reasons": reasons, "plans": [plan.to_dict() for plan in plans]}
        _publish(question, content, plans, reasons)
    if result.interrupted:
        return INTERRUPTED
    return FAILED if result.trials and not plans else _status(plans)


def _write_winner(question: Question, result: search.SearchResult, console: Console) -> None:
    path = question.write_config
    if result.winner is None:
        print(
            f"error: --write_config {path}: nothing to write, no choice that was tried fits",
            file=sys.stderr,
        )
        return
    search.write_config(
        path, question.config, result.winner, also=question.overrides, objective=question.rank
    )
    console.print(f"wrote {path}", markup=False, highlight=False)


def _compare(run: RunConfig, question: Question, console: Console) -> int:
    """This config beside another one, or beside itself at another commit."""
    limits = diff.parse_thresholds(question.max_increase)
    if Path(question.compare.partition(":")[0]).is_file():
        old = _plan(resolve(load(question.compare)), question)
        names = _names(question.compare, question.config)
    else:
        target = question.topology[0]
        cache = () if question.cache is None else ("--cache", str(question.cache.resolve()))
        old = other_commit(question.compare, question.config, question.overrides, target, cache)
        names = [question.compare, "here"]
    new = _plan(run, question)
    changes = diff.compare(old, new, *names)
    if old.estimated or new.estimated:
        console.print(f"ESTIMATE: {words.ESTIMATED}", style="bold yellow")
    diff.show(changes, console)
    over = changes.exceeds(limits)
    for line in over:
        print(f"error: {line}", file=sys.stderr)
    notes = [f"first {changes.old}, then {changes.new}", *changes.config]
    _publish(question, changes.to_dict(), [old, new], notes)
    return FAILED if over else _status([new])


def _names(old: str, new: str) -> list[str]:
    """What tells two config files apart."""
    files = [Path(config.partition(":")[0]) for config in (old, new)]
    if files[0].stem != files[1].stem:
        return [file.stem for file in files]
    arguments = [config.partition(":")[2] for config in (old, new)]
    if files[0].resolve() == files[1].resolve() and arguments[0] == arguments[1]:
        return ["as it is", "with these flags"]
    return [old, new]


def _plan(run: RunConfig, question: Question) -> Plan:
    answers = _answers(run, question)
    if answers.failures:
        raise answers.failures[question.topology[0]]
    if answers.interrupted:
        raise KeyboardInterrupt
    return answers.plans[0]


def _answers(run: RunConfig, question: Question) -> Answers:
    return plan_targets(
        run, question.topology, jobs=question.jobs, cache=question.cache,
        progress=make_progress(), tokens=question.tokens, price=question.price,
    )  # fmt: skip


def _status(plans: Sequence[Plan]) -> int:
    return 0 if any(plan.fits for plan in plans) else DOES_NOT_FIT


def _publish(
    question: Question, content: Any, plans: Sequence[Plan], notes: Sequence[str] = ()
) -> None:
    """Writes what --json and --html ask for."""
    if question.json == "-":
        print(json.dumps(content, indent=1))
    elif question.json:
        Path(question.json).write_text(json.dumps(content, indent=1) + "\n")
    if question.html and plans:
        write_page(plans, question.html, title=Path(question.config).stem, notes=notes)
