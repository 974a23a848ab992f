"""Two runs beside each other as one HTML file: the changes with their intervals, the curves over steps."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_jax.metrics.chart import Series, line_chart, tick_labels, ticks
from llm_jax.metrics.page import document
from llm_jax.metrics.writer import replace_file

if TYPE_CHECKING:
    from llm_jax.evals.compare import Difference, Interval, Run

STYLE = """<style>
.changes .track i.zero { top: 0; bottom: 0; width: 0; height: auto; transform: none;
  border-left: 1.5px solid var(--mark); }
.changes .track i.span { height: 5px; width: auto; transform: translateY(-50%); border-radius: 3px;
  background: var(--mark); }
.changes .track i.point { width: 11px; height: 11px; border-radius: 50%; background: var(--mark); }
.changes .row.clear i.span, .changes .row.clear i.point { background: var(--s0); }
.changes .clear .name { font-weight: 600; }
.compare.changes { --names: 30%; }
tr.clear td { font-weight: 600; }
</style>"""


def write_page(
    path: Path, found: Sequence["Difference"], others: Sequence[str], a: "Run", b: "Run"
) -> Path:
    """found: figures with intervals; others: names of those without."""
    title = f"{b.name} against {a.name}"
    sections = [
        STYLE + f"<header><h1>{html.escape(title)}</h1>{_lead(found, a, b)}</header>",
        _changes(found),
        _table(found, others, a, b),
        _curves(a, b),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [document(title, sections).encode("utf-8", "replace")])
    return path


def _lead(found: Sequence["Difference"], a: "Run", b: "Run") -> str:
    clear = sum(d.is_clear for d in found)
    text = f"A is {a.name}, B is {b.name}. "
    text += (
        f"Measured item by item on both: {len(found)} figure{'s' * (len(found) > 1)}, of which "
        f"{clear} differ{'s' * (clear == 1)} by more than chance; 95 % of 10,000 resamples of the "
        "items agree in which is higher."
        if found
        else "No figure was measured item by item on both."
    )
    return f'<p class="lead">{html.escape(text)}</p>'


def _changes(found: Sequence["Difference"]) -> str:
    """A row per figure: the change as a share of A's value, so that all have one axis."""
    drawn = [d for d in found if d.a.value]
    if not drawn:
        return ""
    parts = [[getattr(d.change, end) / abs(d.a.value) for end in ("low", "value", "high")] for d in drawn]  # fmt: skip
    reach = max(max(abs(x) for part in parts for x in part), 1e-6) * 1.08
    place = lambda x: f"{(x + reach) / (2 * reach):.2%}"  # noqa: E731
    rows = "".join(
        f'<div class="row{" clear" if d.is_clear else ""}" title="{html.escape(_told(d))}">'
        f'<span class="name">{html.escape(d.name)}</span><span class="track" style="background:none">'
        f'<i class="zero" style="left:50%"></i>'
        f'<i class="span" style="left:{place(low)};right:{(reach - high) / (2 * reach):.2%}"></i>'
        f'<i class="point" style="left:{place(value)}"></i></span></div>'
        for d, (low, value, high) in zip(drawn, parts, strict=True)
    )
    places = ticks(-100 * reach, 100 * reach, 7)
    marks = "".join(
        f'<span style="left:{place(x / 100)}">{label} %</span>'
        for x, label in zip(places, tick_labels(places), strict=True)
    )
    return (
        "<section><h2>Change from A to B</h2><p>In percent of A's figure, with 95 % intervals. "
        "Figures whose interval leaves out 0 are blue.</p>"
        f'<figure class="compare changes">{rows}'
        f'<div class="axis"><span></span><div class="ticks">{marks}</div></div></figure></section>'
    )


def _told(d: "Difference") -> str:
    return f"{d.name}: A {_shown(d.a)}, B {_shown(d.b)}, B - A {_shown(d.change)}"


def _shown(interval: "Interval") -> str:
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _table(found: Sequence["Difference"], others: Sequence[str], a: "Run", b: "Run") -> str:
    rows = [
        (d.is_clear, (d.name, f"{d.items:,}", _shown(d.a), _shown(d.b), _shown(d.change)))
        for d in found
    ]
    for name in others:
        one, other = a.evaluation.summary[name], b.evaluation.summary[name]
        rows.append((False, (name, "–", f"{one:.4g}", f"{other:.4g}", f"{other - one:+.4g}")))
    cells = "".join(
        f"<tr{' class=clear' if clear else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for clear, row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in ("score", "items", "A", "B", "B − A"))
    return (
        '<section><h2>All scores</h2><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div></section>"
    )


def _curves(a: "Run", b: "Run") -> str:
    """Scores over steps, where a run has been scored more than once."""
    names = dict.fromkeys(
        name for run in (a, b) for scores in run.curves.values() for name in scores
    )
    charts = []
    for name in names:
        lines = [line for label, run in (("A", a), ("B", b)) if (line := _line(label, run, name))]
        if len(lines) == 2 and max(len(line.steps) for line in lines) > 1 and not _equal(lines):
            charts.append(line_chart(name, lines))
    if not charts:
        return ""
    return f'<section><h2>Over steps</h2><div class="charts">{"".join(charts)}</div></section>'


def _line(label: str, run: "Run", name: str) -> Series | None:
    steps = [step for step in sorted(run.curves) if name in run.curves[step]]
    values = [run.curves[step][name] for step in steps]
    values = [math.nan if value is None else float(value) for value in values]
    return Series(label, np.array(steps, float), np.array(values)) if steps else None


def _equal(lines: Sequence[Series]) -> bool:
    return len(np.unique(np.concatenate([line.values for line in lines]))) == 1
