"""Plans on a terminal: the verdict first, then where memory and time go, then what to change.

Everything holds on 80 columns and without colour: pictures are bars that begin where the one above
them ended, told apart by their place, and a list of arrays or operations turns from columns into
blocks of lines where the columns have no room.
"""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llm_jax.planner import words
from llm_jax.planner.plan import Cost, Exchange, LiveBuffer, Memory, Op, Plan, Roofline

MOST_ROWS = 10
WIDE = 150  # columns, from which lists have a column for everything
BAR, WIDE_BAR = 26, 48
PART_STYLES = {
    "parameters": "blue", "optimizer": "bright_blue", "gradients": "green", "activations": "yellow",
    "logits": "red", "attention": "magenta", "collectives": "bright_magenta", "batch": "cyan",
    "temporaries": "white", "unused": "bright_black", "frozen": "bright_cyan",
}  # fmt: skip
BOUND_STYLES = {"compute": "green", "memory": "blue", "other": "bright_black"}
COMMUNICATION_STYLE = "yellow"
# Of the ranking: columns of words, and those that go below their row where a terminal has no room, in
# this order, the first six together, and how they read there.
_LEFT = ("target", "mesh", "rules", "remat", "fits", "bound")
_UNDER = {
    "mesh": "{}", "rules": "{}", "remat": "remat {}", "micro": "{} microbatches", "days": "{} days",
    "dollars": "{}", "bound": "bound by {}", "MFU": "MFU {}", "tok/s/chip": "{} tok/s/chip",
    "step": "{} a step",
}  # fmt: skip
# Of the whole; what is less is named in a line under the picture, or counted.
_TINY = 1e-3


def show_plan(plan: Plan, console: Console) -> None:
    """The whole report of one target."""
    _headline(plan, console)
    if not plan.fits:  # then the way out comes first
        _findings(plan, console)
    _memory(plan.memory, console)
    if plan.memory.buffers:
        _buffers(words.largest_buffers(plan.memory, MOST_ROWS), console)
    if plan.roofline is not None:
        _time(plan.roofline, console)
    if plan.fits:
        _findings(plan, console)
    if plan.cost is not None:
        _cost(plan.cost, plan, console)
    _footer(plan, console)


def show_ranking(plans: Sequence[Plan], console: Console) -> None:
    """Several plans side by side, a row each, in the order given."""
    rows = words.ranking(plans)
    if not rows:
        return
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    under = _no_room(widths, console.width)
    first = [name for name in widths if name not in under]
    _say(console, _line({name: name for name in first}, widths), "dim")
    for row, plan in zip(rows, plans, strict=True):
        line = Text(_line({name: row[name] for name in first}, widths))
        if not plan.fits:
            line.stylize("red")
        console.print(line, no_wrap=True, overflow="ignore")
        more = [_UNDER[name].format(row[name]) for name in under if row[name]]
        cure = words.cure(plan)
        more += [f"try {cure}"] if cure else []
        if more:
            _say(console, f"  {', '.join(more)}", "dim")
    if any(plan.estimated for plan in plans):
        _say(console, f"~ {words.ESTIMATED}", "dim")


def _no_room(widths: Mapping[str, int], width: int) -> list[str]:
    """The columns of a ranking that go to a second line, under their target."""
    names = [name for name in _UNDER if name in widths]
    needed = lambda under: sum(2 + widths[name] for name in widths if name not in under)  # noqa: E731
    together = [name for name in list(_UNDER)[:6] if name in widths]
    tried = ([], *(names[:count] for count in range(len(together), len(names) + 1)))
    return next((under for under in tried if needed(under) <= width + 2), names)


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    padded = (
        text.ljust(widths[name]) if name in _LEFT else text.rjust(widths[name])
        for name, text in cells.items()
    )
    return "  ".join(padded).rstrip()


def _headline(plan: Plan, console: Console) -> None:
    if plan.estimated:
        _say(console, f"ESTIMATE: {words.ESTIMATED}", "bold yellow")
    _say(console, words.verdict(plan), "bold green" if plan.fits else "bold red")
    cure = words.cure(plan)
    if cure is not None:
        flags = " ".join(f"--config.{override}" for override in cure.split())
        _say(console, f"to make it fit: {flags}", "bold")
    if plan.roofline is not None:
        _say(console, _pace(plan.roofline), "bold")
    _say(console, words.subject(plan))


def _pace(time: Roofline) -> str:
    name, share = words.binding(time)
    pace = f"{words.duration(time.step_seconds)} a step, {time.tokens_per_second:,.0f} tokens/s per chip"
    said = [pace, words.utilization(time), f"bound by {name} ({words.percent(share)})"]
    return "; ".join(filter(None, said))


def _memory(memory: Memory, console: Console) -> None:
    _title(console, f"Memory per chip at the peak, {words.size(memory.peak)}")
    parts = words.ordered_parts(memory)
    _waterfall(parts, PART_STYLES, words.size, memory.peak, memory.capacity, console)
    if memory.at and memory.buffers:  # an estimate knows no moment
        _say(console, f"at {memory.at}", "dim")


def _waterfall(
    amounts: Mapping[str, float],
    styles: Mapping[str, str],
    text,
    total: float,
    capacity: float | None,
    console: Console,
) -> None:
    """A stacked bar, taken apart: each piece on a line of its own, from where the last one ended."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    width = WIDE_BAR if is_wide(console) else BAR
    ascii_only = console.options.ascii_only
    start, tiny = 0.0, []
    for name, value in amounts.items():
        if value < _TINY * total:
            tiny.append(f"{name} {text(value)}")
            continue
        style = styles.get(name, COMMUNICATION_STYLE)
        piece = Text(_piece(start / total, (start + value) / total, width, ascii_only), style=style)
        share = words.percent(value / total)
        table.add_row(name, piece, text(value), share)
        start += value
    if capacity:
        used = total / capacity
        bar = Text(_piece(0, min(used, 1), width, ascii_only), style="red" if used > 1 else "green")
        bar.pad_right(max(0, width - len(bar)), "." if ascii_only else "·")
        table.add_row("of capacity", bar, f"{words.gib(capacity)} GiB", words.percent(used))
    console.print(table)
    if tiny:
        _say(console, f"and {', '.join(tiny)}", "dim")


def _piece(start: float, end: float, width: int, ascii_only: bool) -> str:
    """The characters from `start` to `end`, shares of `width`; at least one, however small."""
    first = min(int(start * width), width - 1)
    last = max(first + 1, round(end * width))
    return " " * first + ("#" if ascii_only else "█") * (last - first)


def _buffers(buffers: Sequence[tuple[int, LiveBuffer]], console: Console) -> None:
    _title(console, f"The {len(buffers)} largest arrays at the peak")
    if is_wide(console):
        table = _table(("size", "part", "array", "whole", "module", "source", "change"))
        table.columns[0].justify = "right"
        for count, b in buffers:
            cells = (
                words.size(b.bytes),
                b.part,
                words.array(b, count),
                words.whole(b),
                b.module,
                b.source,
            )
            table.add_row(*map(escape, cells), f"[bold]{escape(words.remedy(b))}[/]")
    else:
        table = _blocks(("size", "part"))
        for count, b in buffers:
            lines = [
                f"{words.array(b, count)} {words.whole(b)}".strip(),
                f"{b.module} {b.source}".strip(),
            ]
            _add_block(table, (words.size(b.bytes), b.part), lines, words.remedy(b))
    console.print(table)


def _time(roofline: Roofline, console: Console) -> None:
    _title(console, f"Time of a step, {words.duration(roofline.step_seconds)}, by what bounds it")
    bounds = words.ordered_bounds(roofline.bounds)
    _waterfall(bounds, BOUND_STYLES, words.duration, roofline.step_seconds, None, console)
    ops = words.dearest_ops(roofline, MOST_ROWS)
    if ops:
        _ops(ops, roofline, console)
    exchanges = words.dearest_exchanges(roofline)
    if exchanges:
        _exchanges(exchanges, roofline.step_seconds, console)


def _ops(ops: Sequence[Op], roofline: Roofline, console: Console) -> None:
    _title(console, f"The {len(ops)} dearest operations")
    if is_wide(console):
        head = ("ms a step", "share", "times", "bound", "what", "pass", "module", "work", "source")
        table = _table(head, left=head[3:])
    else:
        table = _blocks(("ms", "share", "times"))
    for op in ops:
        seconds = op.exposed * op.times
        figures = (words.milliseconds(seconds), words.percent(seconds / roofline.step_seconds),
                   f"{op.times:,}")  # fmt: skip
        if is_wide(console):
            rest = (op.bound, op.kind, op.direction, op.module, words.work(op), op.source)
            table.add_row(*figures, *map(escape, rest))
        else:
            what = f"{op.kind}, {op.direction}: {op.module} {words.work(op)}"
            _add_block(table, figures, [what, f"{op.bound}, {op.source}".strip(", ")])
    console.print(table)


def _exchanges(exchanges: Sequence[Exchange], step: float, console: Console) -> None:
    dearest = [e for e in exchanges if e.seconds * e.times >= _TINY * step][:MOST_ROWS]
    if not dearest:
        _title(console, "Collectives")
        _say(console, f"{len(exchanges)}, none of which takes {words.percent(_TINY)} of the step")
        return
    title = "Collectives"
    if len(dearest) < len(exchanges):
        title = f"The {len(dearest)} dearest of {len(exchanges)} collectives"
    _title(console, title)
    wide = is_wide(console)
    head = ("exposed ms", "ms each", "times", "bytes", "kind", "axes", "pass", "serves", "source")
    table = _table(head, left=head[4:]) if wide else _blocks(("exposed ms", "ms each", "times"))
    for e in dearest:
        figures = (words.milliseconds(e.exposed * e.times), words.milliseconds(e.seconds),
                   f"{e.times:,}")  # fmt: skip
        serves = f"{e.role} {e.tensor}".strip()
        if wide:
            rest = (words.size(e.bytes), e.kind, e.axes, e.direction, serves, e.source)
            table.add_row(*figures, *map(escape, rest))
        else:
            what = f"{e.kind} over {e.axes}, {words.size(e.bytes)}, {e.direction}"
            _add_block(table, figures, [what, f"{serves}, {e.source}".strip(", ")])
    console.print(table)


def _findings(plan: Plan, console: Console) -> None:
    if not plan.findings:
        return
    _title(console, "Findings")
    table = Table.grid(padding=(0, 1))
    for finding in plan.findings:
        cost = words.price_of(finding)
        text = Text(finding.text + (f" ({cost})" if cost else ""))
        where = Text(f"\n{finding.source}" if finding.source else "", style="dim")
        change = Text(f"\ntry {finding.change}" if words.untold(finding) else "", style="bold")
        table.add_row("-", Text(finding.kind, style="yellow"), text + where + change)
    console.print(table)


def _cost(cost: Cost, plan: Plan, console: Console) -> None:
    _title(console, f"Training on {words.amount(cost.tokens)} tokens")
    said = [words.days(cost.days), f"{words.number(cost.chip_hours)} chip-hours"]
    if cost.dollars is not None:
        said.append(f"{words.money(cost.dollars)} at ${cost.dollars_per_chip_hour:g} per chip-hour")
    _say(console, f"{', '.join(said)} on {words.chips(plan.num_chips)}", "bold")
    _say(console, f"price: {cost.price_note}", "dim")


def _footer(plan: Plan, console: Console) -> None:
    said = [" ".join(pair) for pair in plan.versions.items()]
    said += [f"{name} {words.duration(seconds)}" for name, seconds in plan.seconds.items()]
    if plan.host_peak_bytes:
        said.append(f"{words.size(plan.host_peak_bytes)} of this machine's memory")
    line = "; ".join(filter(None, (", ".join(said), words.who_says(plan))))
    if line:
        console.print()
        _say(console, line, "dim")


def _table(columns: Sequence[str], left: Sequence[str] | None = None) -> Table:
    """left: the columns of words; all of them by default."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for name in columns:
        is_left = left is None or name in left
        table.add_column(name, justify="left" if is_left else "right", overflow="fold")
    return table


def _blocks(figures: Sequence[str]) -> Table:
    """A few figures, and beside them lines of words."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in figures:
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    return table


def _add_block(
    table: Table, figures: Sequence[str], lines: Sequence[str], last: str | None = None
) -> None:
    first, *others = [line for line in lines if line] or [""]
    words_ = Text(first)
    for line in others:
        words_.append(f"\n{line}", style="dim")
    if last:
        words_.append(f"\n{last}", style="bold")
    table.add_row(*map(escape, figures), words_)


def is_wide(console: Console) -> bool:
    return console.width >= WIDE


def _title(console: Console, text: str) -> None:
    console.print()
    _say(console, text, "bold underline")


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=False)
