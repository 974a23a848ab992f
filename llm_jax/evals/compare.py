"""Two runs beside each other, item by item: what differs, and whether it may be chance.

Both were asked the same items, so their difference is taken item by item, and its interval comes from
resampling items (the paired bootstrap; Efron & Tibshirani 1993, chapter 16; Koehn 2004 for texts).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llm_jax.core.config import ConfigError
from llm_jax.evals.compare_page import write_page
from llm_jax.evals.evaluation import Evaluation
from llm_jax.evals.findings import Items
from llm_jax.metrics.scores import read_scores, scored_steps, scores_path

RESAMPLES = 10_000
_AT_ONCE = 2**22  # numbers of a resample that stand in memory together


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and where 95 % of its resamples lie."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A figure of both runs over the `items` that both were asked; `change`: of b less of a."""

    name: str
    items: int
    a: Interval
    b: Interval
    change: Interval

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the change leaves out 0."""
        return self.change.low > 0 or self.change.high < 0


@dataclasses.dataclass(frozen=True)
class Run:
    """A scored checkpoint; curves: step to scores, of all that is known of the run."""

    name: str
    workdir: Path
    evaluation: Evaluation
    curves: Mapping[int, Mapping[str, float | None]]

    @classmethod
    def of(cls, name: str) -> "Run":
        """From "DIR" or "DIR@STEP"; without a step the newest that has scores.

        Raises:
          ConfigError: there are no scores.
        """
        folder, at, number = name.rpartition("@")
        if not (at and number.isdigit()):
            folder, number = name, ""
        workdir = Path(folder)
        steps = scored_steps(workdir)
        if not steps:
            raise ConfigError(
                f"{folder} has no scores: python -m llm_jax.evaluate --workdir {folder} makes them"
            )
        step = int(number) if number else steps[-1]
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise ConfigError(f"{folder} has no scores of step {step}; there are: {there}")
        evaluation = Evaluation.load(scores_path(workdir, step))
        return cls(f"{folder}@{step}", workdir, evaluation, read_scores(workdir))


def compare(a: str, b: str, console: Console) -> Path:
    """Prints a table and writes RUN_B/evals/compare.html; gives its path.

    Raises:
      ConfigError: a run without scores, or two that were asked nothing in common.
    """
    one, other = Run.of(a), Run.of(b)
    found = differences(one.evaluation, other.evaluation)
    shared = sorted(set(one.evaluation.summary) & set(other.evaluation.summary))
    told = {d.name for d in found}
    others = [name for name in shared if name not in told and not _is_equal(name, one, other)]
    if not shared:
        raise ConfigError(f"{one.name} and {other.name} have no score in common")
    _show(found, others, one, other, console)
    path = write_page(other.workdir / "evals" / "compare.html", found, others, one, other)
    console.print(f"page {path}", highlight=False, soft_wrap=True)
    return path


def differences(a: Evaluation, b: Evaluation) -> list[Difference]:
    """Of each figure that both have item by item, over the items that both have."""
    found = []
    for name in a.items:
        if name in b.items and (difference := _difference(name, a.items[name], b.items[name])):
            found.append(difference)
    return found


def _difference(name: str, a: Items, b: Items) -> Difference | None:
    places = {item: place for place, item in enumerate(b.names)}
    pairs = [(i, places[item]) for i, item in enumerate(a.names) if item in places]
    if not pairs:
        return None
    mine, theirs = np.array(pairs).T
    sums = np.array([np.array(a.sums)[mine], np.array(b.sums)[theirs]])  # [2, N]
    weights = np.array([np.array(a.weights)[mine], np.array(b.weights)[theirs]])
    means, resampled = sums.sum(1) / weights.sum(1), _resampled(sums, weights)
    intervals = [_interval(m, r) for m, r in zip(means, resampled, strict=True)]
    change = _interval(means[1] - means[0], resampled[1] - resampled[0])
    return Difference(name, len(pairs), *intervals, change)


def _resampled(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sums, weights: [2, N] of two models on the same items; their figures in resamples: [2, R]."""
    count, rng = sums.shape[1], np.random.default_rng(0)
    parts, left = [], RESAMPLES
    while left:
        size = min(left, max(_AT_ONCE // count, 1))
        left -= size
        times = rng.multinomial(count, np.full(count, 1 / count), size).T  # [N, size]
        parts.append((sums @ times) / (weights @ times))
    return np.concatenate(parts, axis=1)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(value), float(low), float(high))


def _is_equal(name: str, a: Run, b: Run) -> bool:
    """Such as the number of items: says nothing of the models."""
    return a.evaluation.summary[name] == b.evaluation.summary[name]


def _show(found: list[Difference], others: list[str], a: Run, b: Run, console: Console) -> None:
    table = Table(
        title=f"A: {a.name}\nB: {b.name}", title_justify="left", caption_justify="left",
        caption="in brackets: 95 % of resamples of the items; bold: the change is not chance",
    )  # fmt: skip
    for column in ("score", "items", "A", "B", "B - A"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for d in found:
        change = f"{d.change.value:+.4g} [{d.change.low:+.4g}, {d.change.high:+.4g}]"
        row = [d.name, f"{d.items:,}", *(f"{x.value:.4g} [{x.low:.4g}, {x.high:.4g}]" for x in (d.a, d.b)), change]  # fmt: skip
        table.add_row(*(cell.replace("[", r"\[") for cell in row), style="bold" if d.is_clear else None)  # fmt: skip
    for name in others:
        one, other = a.evaluation.summary[name], b.evaluation.summary[name]
        table.add_row(name, "", f"{one:.4g}", f"{other:.4g}", f"{other - one:+.4g}")
    console.print(table)
