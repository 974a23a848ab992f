"""The page of a plan, or of several side by side: one HTML file that needs nothing else.

It is a run report's page (metrics/page.py) with tables and pictures of its own: nothing is fetched, it
follows the reader's light or dark, and it prints. The same plans give the same bytes.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.metrics.chart import compact
from llm_jax.metrics.page import document
from llm_jax.metrics.writer import replace_file
from llm_jax.planner import pictures, words
from llm_jax.planner.chips import CHIPS
from llm_jax.planner.pictures import Bar
from llm_jax.planner.plan import Memory, Op, Plan, Roofline
from llm_jax.planner.style import STYLE

MOST_BUFFERS, MOST_EXCHANGES = 20, 30
_SMALL = 0.5  # of the capacity


def write_page(
    plans: Sequence[Plan], path: str | Path, *, title: str = "Plan", notes: Sequence[str] = ()
) -> Path:
    """Writes the page, whole or not at all: a comparison where there are several, then each plan.

    Args:
      title: what was planned, e.g. the name of the config.
      notes: sentences under the comparison, e.g. why the first plan wins.
    """
    colors = pictures.bound_colors(plans)
    alone = len(plans) == 1
    sections = [f"<style>{STYLE}</style><header><h1>{html.escape(title)}</h1>"]
    sections[0] += f'<p class="lead">{_lead(plans)}</p></header>'
    if not alone:
        sections.append(_comparison(plans, colors, notes))
    for plan, label in zip(plans, words.labels(plans), strict=True):
        sections += _plan(plan, colors, "" if alone else label)
    path = Path(path)
    replace_file(path, [document(title, sections).encode("utf-8", "replace")])
    return path


def _lead(plans: Sequence[Plan]) -> str:
    if len(plans) == 1:
        return html.escape(words.subject(plans[0]))
    fitting = sum(plan.fits for plan in plans)
    return f"{len(plans)} plans, {fitting} of them fit in memory."


def _plan(plan: Plan, colors: Mapping[str, str], label: str) -> list[str]:
    """label: what tells it from the others on the page, "" where it is alone."""
    head = ""
    if label:
        head = f'<h2 class="plan">{html.escape(label)}</h2>'
        head += f'<p class="soft">{html.escape(words.subject(plan))}</p>'
    verdict = html.escape(words.verdict(plan)).replace(" %", "&nbsp;%")
    head += f'<p class="answer{"" if plan.fits else " no"}">{verdict}</p>'
    if plan.estimated:
        head += f'<p class="estimate">Estimate: {words.ESTIMATED}.</p>'
    sections = [head + _tiles(plan), _findings(plan), _memory(plan.memory)]
    if plan.roofline is not None:
        sections += [_time(plan, plan.roofline, colors), _communication(plan.roofline)]
    return [*sections, _about(plan)]


def _tiles(plan: Plan) -> str:
    memory, time, cost = plan.memory, plan.roofline, plan.cost
    tiles = {f"peak of {words.gib(memory.capacity)} GiB per chip": words.size(memory.peak)}
    if time is not None:
        name, share = words.binding(time)
        tiles["a step"] = words.duration(time.step_seconds)
        tiles["tokens per second and chip"] = f"{time.tokens_per_second:,.0f}"
        if time.mfu is not None:
            causal = "" if time.mfu_causal is None else f"; causal {words.percent(time.mfu_causal)}"
            tiles[f"MFU over all scores{causal}"] = words.percent(time.mfu)
        tiles[f"of the time bound by {name}"] = words.percent(share)
    if cost is not None:
        tiles[
            f"for {words.amount(cost.tokens)} tokens, {words.number(cost.chip_hours)} chip-hours"
        ] = words.days(cost.days)
        if cost.dollars is not None:
            tiles[f"at ${cost.dollars_per_chip_hour:g} per chip-hour; {cost.price_note}"] = (
                words.money(cost.dollars)
            )
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in tiles.items()
    ).replace(" %", "&nbsp;%")
    columns = len(tiles) if len(tiles) <= 5 else -(-len(tiles) // 2)
    return f'<dl class="tiles" style="--columns:{columns}">{cells}</dl>'


def _findings(plan: Plan) -> str:
    items = []
    for finding in plan.findings:
        cost = words.price_of(finding)
        change = (
            f" Try <code>{html.escape(finding.change)}</code>." if words.untold(finding) else ""
        )
        about = ", ".join(filter(None, (finding.kind, cost, finding.source)))
        items.append(
            f'<li class="of-{finding.kind}">{html.escape(finding.text)}{"" if finding.text.endswith(".") else "."}'
            f'{change}<span class="soft">{html.escape(about)}</span></li>'
        )
    return _section("Findings", f'<ul class="findings">{"".join(items)}</ul>' if items else "")


def _memory(memory: Memory) -> str:
    pieces = pictures.memory_pieces(memory)
    mark = (
        (memory.capacity, f"capacity {words.gib(memory.capacity)} GiB") if memory.capacity else None
    )
    said = words.size(memory.peak)
    body = pictures.stacked_bars([Bar("in the chip", pieces, said, mark)])
    if memory.peak < _SMALL * memory.capacity:  # then the parts are too thin to see
        body += pictures.stacked_bars([Bar("enlarged", pieces, said)])
    body += pictures.legend(pieces, memory.peak or 1)
    if len(memory.timeline) > 1:
        body += pictures.timeline(memory)
        body += f'<p class="note">{html.escape(_peak(memory))}</p>'
    if memory.buffers:
        body += f"<h3>Largest arrays at the peak</h3>{_buffers(memory)}"
    return _section("Memory per chip", body)


def _peak(memory: Memory) -> str:
    said = f"The peak is at {memory.at}." if memory.at else ""
    unused = memory.parts.get("unused", 0)
    if unused:
        said += (
            f" {words.size(unused)} that lie unused between arrays come on top of what is alive."
        )
    return said.strip()


def _buffers(memory: Memory) -> str:
    rows = [
        (
            words.size(b.bytes),
            f'<i class="swatch {pictures.PART_COLORS[b.part]}"></i> {b.part}',
            _two(words.array(b, count), words.whole(b)),
            _two(b.module, b.source),
            _two(b.change or "", f"saves {words.size(b.saves)}" if b.saves else ""),
        )
        for count, b in words.largest_buffers(memory, MOST_BUFFERS)
    ]
    return _table(("size", "part", "array", "from", "smaller by"), rows, words_from=1)


def _time(plan: Plan, roofline: Roofline, colors: Mapping[str, str]) -> str:
    bounds = words.ordered_bounds(roofline.bounds)
    passes = words.by_direction(roofline)
    bars = [
        Bar(name, pictures.bound_pieces(part, colors), words.duration(sum(part.values())))
        for name, part in passes.items()
    ]
    body = pictures.stacked_bars(bars)
    body += pictures.legend(pictures.bound_pieces(bounds, colors), roofline.step_seconds)
    ops = words.dearest_ops(roofline, pictures.MAX_CIRCLES)
    shown, rest = ops[: pictures.NUMBERED], ops[pictures.NUMBERED :]
    chip = CHIPS.get(plan.chip)
    if chip is not None and ops:
        body += pictures.roofline_plot(ops, roofline.step_seconds, chip)
    if ops:
        body += f"<h3>Dearest operations, by their numbers above</h3>{_ops(roofline, shown)}"
    if rest:  # circles say what they are to a mouse only
        more = _ops(roofline, rest, first=len(shown) + 1)
        body += f"<details><summary>{len(rest)} more</summary>{more}</details>"
    who = words.who_says(plan)
    note = f'<p class="note">{html.escape(who[:1].upper() + who[1:])}.</p>' if who else ""
    return _section(f"Time of a step, {words.duration(roofline.step_seconds)}", body + note)


def _ops(roofline: Roofline, ops: Iterable[Op], first: int = 1) -> str:
    """first: the number of the first one."""
    rows = []
    for number, op in enumerate(ops, first):
        seconds = op.exposed * op.times
        rate = f"{words.rate(op.flops / op.seconds)}FLOP/s" if op.flops and op.seconds else ""
        if rate and op.bytes:
            rate += f", {compact(op.flops / op.bytes)} FLOPs per byte"
        rows.append(
            (
                str(number),
                words.milliseconds(seconds),
                words.percent(seconds / roofline.step_seconds),
                f"{op.times:,}",
                _two(f"{op.kind}, {op.direction}", rate),
                _two(op.bound, op.by),
                _two(f"{op.module} {words.work(op)}", op.source),
            )
        )
    head = ("", "ms a step", "share", "times", "what", "bound", "from")
    return _table(head, rows, words_from=4)


def _communication(roofline: Roofline) -> str:
    exchanges = words.dearest_exchanges(roofline)
    if not exchanges:
        return ""
    rows = [
        (
            words.milliseconds(e.exposed * e.times),
            words.milliseconds(e.seconds),
            f"{e.times:,}",
            words.size(e.bytes),
            _two(e.kind, f"over {e.axes}, {e.direction}"),
            _two(f"{e.role} {e.tensor}", e.source),
        )
        for e in exchanges
    ]
    head = ("exposed ms a step", "ms each", "times", "bytes", "collective", "serves")
    body = _table(head, rows[:MOST_EXCHANGES], words_from=4)
    if len(rows) > MOST_EXCHANGES:
        more = _table(head, rows[MOST_EXCHANGES:], words_from=4)
        body += f"<details><summary>{len(rows) - MOST_EXCHANGES} more</summary>{more}</details>"
    exposed = sum(e.exposed * e.times for e in exchanges)
    whole = sum(e.seconds * e.times for e in exchanges)
    note = (
        f'<p class="note">{words.duration(whole)} of communication in a step, of which '
        f"{words.duration(exposed)} are exposed; the rest runs under computation.</p>"
    )
    return _section("Communication", body + note)


def _comparison(plans: Sequence[Plan], colors: Mapping[str, str], notes: Sequence[str]) -> str:
    table = words.ranking(plans)
    left = [
        name for name in ("target", "mesh", "rules", "remat", "fits", "bound") if name in table[0]
    ]
    head = [*left[:1], *(name for name in table[0] if name not in left), *left[1:]]
    rows = []
    for row, plan in zip(table, plans, strict=True):
        cells = {name: html.escape(text) for name, text in row.items()}
        if not plan.fits:
            cells["fits"] = '<span class="no-fit">no</span>'
        rows.append([cells[name] for name in head])
    numbers = len(head) - len(left) + 1
    body = _table(head, rows, words_from=numbers, first_is_word=True)
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body += f'<ul class="reasons">{items}</ul>'
    labels = list(zip(plans, words.labels(plans), strict=True))
    memory = [
        Bar(label, pictures.memory_pieces(p.memory, 1 / (p.memory.capacity or p.memory.peak)),
            words.size(p.memory.peak), (1.0, f"{words.gib(p.memory.capacity)} GiB"))
        for p, label in labels
    ]  # fmt: skip
    body += f"<h3>Memory per chip, as a share of its capacity</h3>{pictures.keys(pictures.PART_COLORS)}{pictures.stacked_bars(memory)}"
    time = [
        Bar(label, pictures.bound_pieces(words.ordered_bounds(p.roofline.bounds), colors),
            words.duration(p.roofline.step_seconds))
        for p, label in labels if p.roofline is not None
    ]  # fmt: skip
    if time:
        body += f"<h3>Time of a step</h3>{pictures.keys(colors)}{pictures.stacked_bars(time)}"
    return _section("Side by side", f'<div class="wide-names">{body}</div>')


def _about(plan: Plan) -> str:
    chip = CHIPS.get(plan.chip)
    facts = {"chip": plan.chip}
    if chip is not None:
        if chip.peak_flops:
            facts["peak"] = f"{words.rate(chip.peak_flops)}FLOP/s in bfloat16"
        facts["memory"] = f"{words.gib(chip.hbm_bytes)} GiB that a program can allocate"
        if chip.hbm_bytes_per_second:
            facts["memory rate"] = f"{words.rate(chip.hbm_bytes_per_second)}B/s"
        if chip.link_bytes_per_second:
            facts["links"] = f"{chip.links} of {words.rate(chip.link_bytes_per_second)}B/s each way"
    made = {**plan.versions, **{name: words.duration(s) for name, s in plan.seconds.items()}}
    if plan.host_peak_bytes:
        made["memory of the compiling machine"] = words.size(plan.host_peak_bytes)
    body = f'<div class="facts-grid">{_facts(facts)}{_facts(made)}</div>'
    body += f'<div class="tree mono">{_tree(plan.config)}</div>'
    return _section("Chip, compiler, configuration", body)


def _tree(config: Mapping[str, Any]) -> str:
    parts = []
    for name, values in config.items():
        values = values if isinstance(values, Mapping) else {"": values}
        facts = _facts({key: repr(value) for key, value in values.items()})
        parts.append(f"<details><summary>{html.escape(str(name))}</summary>{facts}</details>")
    return "".join(parts)


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _two(first: str, second: str) -> str:
    """A cell of two lines, the second one softer."""
    under = f'<span class="soft">{html.escape(second.strip())}</span>' if second.strip() else ""
    return html.escape(first.strip()) + under


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words_from: int,
    first_is_word: bool = False,
) -> str:
    """Cells are HTML; columns from `words_from` on hold words, those before figures."""

    def row(cells: Sequence[str], tag: str) -> str:
        is_word = lambda i: i >= words_from or (first_is_word and i == 0)  # noqa: E731
        start = '<th scope="col"' if tag == "th" else f"<{tag}"
        return "".join(
            f'{start} class="{"w wrap" if is_word(i) and len(cell) > 60 else "w" if is_word(i) else ""}">{cell}</{tag}>'
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return (
        f'<div class="scroll"><table class="list"><thead><tr>{row(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""
