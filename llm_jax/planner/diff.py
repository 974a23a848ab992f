"""Two plans side by side: memory, time, every collective, and whether the new one costs too much.

Collectives are matched by what they do (kind, mesh axes, tensor, pass), not by the compiler's names, which
change with any edit. A CI job compares a change to the commit before it and fails over thresholds;
see docs/planner_ci.yml.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llm_jax.core.config import ConfigError, nearest
from llm_jax.planner import words
from llm_jax.planner.plan import Exchange, Plan
from llm_jax.planner.terminal import is_wide
from llm_jax.training.config import differences

THRESHOLDS = ("memory", "time", "communication")
MOST_ROWS = 20
_EXCHANGES = "collectives that differ: times, bytes sent, exposed"
_TINY = 1e-3  # of the peak; what is less takes no row


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure of the old and of the new plan; None where a plan has none."""

    name: str
    old: float | None
    new: float | None

    @property
    def percent(self) -> float | None:
        """How much more the new one is; None where that cannot be said."""
        if not self.old or self.new is None:
            return 0.0 if self.old == self.new == 0 else None
        return 100 * (self.new / self.old - 1)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Over one step: runs, bytes that a device sends, seconds that nothing hides."""

    times: int
    sent_bytes: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class ExchangeChange:
    """The collectives that do one thing; None where a plan has none of them."""

    kind: str
    axes: str
    tensor: str
    direction: str
    old: Traffic | None
    new: Traffic | None


@dataclasses.dataclass(frozen=True)
class Diff:
    """memory, time, sizes: what changed and what did not; seconds, bytes per chip, counts.

    exchanges: those that differ, the largest difference first. config: `config.a.b: old -> new`.
    communication: bytes that a device sends in a step.
    """

    old: str
    new: str
    old_fits: bool
    new_fits: bool
    peak: Change
    parts: tuple[Change, ...]
    step: Change
    bounds: tuple[Change, ...]
    mfu: Change
    communication: Change
    exchanges: tuple[ExchangeChange, ...]
    sizes: tuple[Change, ...]
    config: tuple[str, ...]

    def exceeds(self, thresholds: Mapping[str, float]) -> list[str]:
        """What grew by more percent than allowed, a line each.

        Args:
          thresholds: percent by name of THRESHOLDS.
        """
        lines = []
        if "memory" in thresholds and self.old_fits and not self.new_fits:
            lines.append(f"memory: it fitted and does not fit any more ({_gib(self.peak)})")
        figures: dict[str, tuple[Change, Callable[[Change], str]]] = {
            "memory": (self.peak, _gib),
            "time": (self.step, lambda c: f"step {_pair(c, words.duration)}"),
            "communication": (self.communication, lambda c: f"sent {_pair(c, words.size)}"),
        }
        for name, most in thresholds.items():
            change, describe = figures[name]
            percent = change.percent
            if percent is None and change.new is not None and change.old is not None:
                percent = float("inf")
            if percent is not None and percent > most:
                lines.append(f"{name} {percent:+.1f}% ({describe(change)}) is over {most:g}%")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)


def parse_thresholds(text: str) -> dict[str, float]:
    """Percent by name, of "memory=5,time=2.5".

    Raises:
      ConfigError: an unknown name, or no number of percent that a figure can grow by.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in THRESHOLDS:
            raise ConfigError(
                f"--max_increase {part!r}: unknown figure{nearest(name, THRESHOLDS)}; choices: "
                f"{', '.join(THRESHOLDS)}"
            )
        try:
            found[name] = float(value.removesuffix("%"))
        except ValueError:
            found[name] = math.nan
        if not 0 <= found[name] < math.inf:
            raise ConfigError(f"--max_increase {part!r}: expected percent, at least 0: {name}=5")
    return found


def compare(old: Plan, new: Plan, old_name: str = "old", new_name: str = "new") -> Diff:
    """What changes from one plan to another."""
    before, after = old.roofline, new.roofline
    moved = [_traffic(plan.roofline.exchanges if plan.roofline else ()) for plan in (old, new)]
    parts = list({**old.memory.parts, **new.memory.parts})
    totals = collections.Counter(before.bounds if before else {})
    bounds = words.ordered_bounds(totals | collections.Counter(after.bounds if after else {}))
    return Diff(
        old=old_name,
        new=new_name,
        old_fits=old.fits,
        new_fits=new.fits,
        peak=Change("peak", old.memory.peak, new.memory.peak),
        parts=tuple(
            Change(part, old.memory.parts.get(part, 0), new.memory.parts.get(part, 0))
            for part in parts
        ),
        step=Change("step", _of(before, "step_seconds"), _of(after, "step_seconds")),
        bounds=tuple(
            Change(
                bound,
                before.bounds.get(bound, 0.0) if before else None,
                after.bounds.get(bound, 0.0) if after else None,
            )
            for bound in bounds
        ),
        mfu=Change("MFU", _of(before, "mfu"), _of(after, "mfu")),
        communication=Change("sent", _sent(old), _sent(new)),
        exchanges=_changed(*moved),
        sizes=(
            Change("parameters", old.num_params, new.num_params),
            Change("tokens per step", old.tokens_per_step, new.tokens_per_step),
            Change("chips", old.num_chips, new.num_chips),
        ),
        config=tuple(differences(old.config, new.config)),
    )


def show(diff: Diff, console: Console) -> None:
    """The comparison as tables: figures, collectives, config."""
    table = Table(box=box.SIMPLE, title="memory and time per step")
    table.add_column("")
    for name in (diff.old, diff.new, "change"):
        table.add_column(escape(name), justify="right", overflow="fold")
    _row(table, diff.peak, words.size, bold=True)
    for part in diff.parts:
        if max(part.old, part.new) >= _TINY * max(diff.peak.old, diff.peak.new):
            _row(table, part, words.size)
    _row(table, diff.step, words.duration, bold=True)
    for bound in diff.bounds:
        _row(table, bound, words.duration)
    _row(table, diff.mfu, words.percent)
    _row(table, diff.communication, words.size)
    for size in diff.sizes:
        if size.old != size.new:
            _row(table, size, words.amount)
    console.print(table)
    if not (diff.old_fits and diff.new_fits):
        fits = {True: "fits", False: "does not fit"}
        said = f"{diff.old} {fits[diff.old_fits]}, {diff.new} {fits[diff.new_fits]}"
        console.print(said, markup=False)
    _show_exchanges(diff, console)
    for line in diff.config:
        console.print(escape(line), highlight=False)


def _show_exchanges(diff: Diff, console: Console) -> None:
    if None in (diff.communication.old, diff.communication.new):
        console.print("collectives are not compared: a plan has no program that could be timed")
        return
    if not diff.exchanges:
        console.print("the same collectives", highlight=False)
        return
    (_exchange_table if is_wide(console) else _exchange_lines)(diff, console)
    if len(diff.exchanges) > MOST_ROWS:
        console.print(f"and {len(diff.exchanges) - MOST_ROWS} more")


def _exchange_table(diff: Diff, console: Console) -> None:
    table = Table(box=box.SIMPLE, title=_EXCHANGES)
    table.add_column("collective", no_wrap=True)
    table.add_column("tensor", overflow="fold")
    for name in (diff.old, diff.new):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for one in diff.exchanges[:MOST_ROWS]:
        tensor = escape(_short(one.tensor).replace(", ", "\n"))
        table.add_row(escape(_what(one)), tensor, _moved(one.old), _moved(one.new))
    console.print(table)


def _exchange_lines(diff: Diff, console: Console) -> None:
    """Where columns have no room, a line for each plan."""
    console.print(Text(_EXCHANGES, style="italic"))
    for one in diff.exchanges[:MOST_ROWS]:
        console.print(Text(f"{_what(one)}: {_short(one.tensor)}"))
        for name, traffic in ((diff.old, one.old), (diff.new, one.new)):
            console.print(Text(f"  {_moved(traffic)}  {name}", style="dim"))


def _what(one: ExchangeChange) -> str:
    return f"{one.kind} {one.axes}, {one.direction}"


def _short(tensor: str) -> str:
    return tensor.replace("params.stack.layers.", "")


def _row(
    table: Table, change: Change, describe: Callable[[float], str], bold: bool = False
) -> None:
    values = ["none" if x is None else describe(x) for x in (change.old, change.new)]
    percent = "" if change.percent is None else f"{change.percent:+.1f}%"
    table.add_row(change.name, *values, percent, style="bold" if bold else None)


def _moved(traffic: Traffic | None) -> str:
    if traffic is None:
        return "none"
    size, time = words.size(traffic.sent_bytes), words.duration(traffic.exposed)
    return f"{traffic.times} x, {size}, {time}"


def _traffic(exchanges: Iterable[Exchange]) -> dict[tuple[str, ...], Traffic]:
    sums: dict[tuple[str, ...], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for one in exchanges:
        total = sums[one.kind, one.axes, one.tensor, one.direction]
        total[0] += one.times
        total[1] += one.sent_bytes * one.times
        total[2] += one.exposed * one.times
    return {key: Traffic(int(times), sent, exposed) for key, (times, sent, exposed) in sums.items()}


def _changed(
    old: Mapping[tuple[str, ...], Traffic], new: Mapping[tuple[str, ...], Traffic]
) -> tuple[ExchangeChange, ...]:
    changes = [
        ExchangeChange(*key, old.get(key), new.get(key))
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    sent = lambda traffic: traffic.sent_bytes if traffic else 0.0  # noqa: E731
    return tuple(sorted(changes, key=lambda c: -abs(sent(c.new) - sent(c.old))))


def _sent(plan: Plan) -> float | None:
    if plan.roofline is None:
        return None
    return sum(one.sent_bytes * one.times for one in plan.roofline.exchanges)


def _of(roofline: Any, field: str) -> float | None:
    return None if roofline is None else getattr(roofline, field)


def _pair(change: Change, describe: Callable[[float], str]) -> str:
    return " -> ".join("none" if x is None else describe(x) for x in (change.old, change.new))


def _gib(change: Change) -> str:
    return f"peak {words.gib(change.old)} -> {words.gib(change.new)} GiB"
