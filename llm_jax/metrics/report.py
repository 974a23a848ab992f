"""The run report: metrics.jsonl and what the run knows, as one HTML file that stands on its own.

Every part is optional but the title: a run without evaluation, or with a single record, still gets
its page. The same input gives the same bytes; nothing on the page depends on the time.
"""

import contextlib
import html
import json
import math
import os
import platform
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.metrics.chart import MAX_DOTS, Series, compact, line_chart, tick_labels, ticks
from llm_jax.metrics.page import document
from llm_jax.metrics.scores import read_jobs_scores
from llm_jax.metrics.writer import METRICS_FILE, RESERVED, read_records, replace_file

REPORT_FILE = "report.html"
FACTS_FILE = "report.json"  # what the run knew when it wrote its report
RESUMED = "resumed"  # a record with this key is the first after a restart
CHARTS = {
    "Learning rate": "learning_rate",
    "Gradient norm": "grad_norm",
    "Tokens per second": "tokens_per_second",
    "Model FLOPs utilization": "mfu",
    "Held-out bits per byte": "eval/bits_per_byte",
}
COMPRESSORS = {"model_bpb": "model", "gzip_bpb": "gzip -9", "xz_bpb": "xz -9"}
MAX_TILE_COLUMNS = 6
MAX_NAMED_ROWS, MAX_ROWS = 40, 300  # of the compression picture
SUMMED_COLUMNS = ("documents", "tokens", "bytes")


def write_report(
    workdir: str | os.PathLike,
    *,
    title: str,
    config: Mapping[str, Any],
    summary: Mapping[str, str | float],
    samples: Sequence[Mapping[str, str]],
    data: Mapping[str, Mapping[str, Any]],
    compression: Sequence[Mapping[str, Any]] | None,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Writes `workdir`/report.html from metrics.jsonl and scores.jsonl, where there are such, and the arguments.

    These are kept, so that `refresh_report` can draw the page again when there are new scores.

    Args:
      config: the parsed config as plain dicts, lists and scalars.
      summary: the headline numbers, label to value, in the order of their importance.
      samples: "prompt" and "text"; the text may begin with the prompt or go on from it.
      data: source name to its columns (documents, tokens, bytes, epochs, ...).
      compression: per held-out file "name", "bytes", "model_bpb", "gzip_bpb", "xz_bpb" (bits per
        byte; None where it was not measured).
      environment: fact to value; None asks jax, which starts its backend if nothing has yet.

    Returns:
      The path of the report.
    """
    facts = {
        "title": title,
        "config": config,
        "summary": dict(summary),
        "samples": list(samples),
        "data": data,
        "compression": list(compression or ()),
        "environment": _environment() if environment is None else environment,
    }
    text = json.dumps(facts, indent=1, default=str)
    replace_file(Path(workdir) / FACTS_FILE, [text.encode() + b"\n"])
    return refresh_report(workdir)


def refresh_report(workdir: str | os.PathLike) -> Path:
    """Writes the report again, of a run that still trains with what is known so far.

    Leaves one that an earlier version has written, which kept no facts.
    """
    workdir = Path(workdir)
    path, facts_file = workdir / REPORT_FILE, workdir / FACTS_FILE
    if not facts_file.exists():
        if path.exists():
            return path
        with contextlib.suppress(FileExistsError), open(facts_file, "x") as file:
            file.write("{}\n")
    while True:
        before = facts_file.read_bytes()
        _draw(path, json.loads(before or b"{}"))
        if facts_file.read_bytes() == before:  # the run has not ended meanwhile
            return path


def _draw(path: Path, known: Mapping[str, Any]) -> None:
    """Writes the page; known: what `write_report` has kept, or nothing."""
    workdir = path.parent
    columns, resumed = _read_columns(workdir / METRICS_FILE)
    facts = {
        "title": workdir.resolve().name, "config": {}, "summary": {}, "samples": [], "data": {},
        "compression": [], "environment": {}, **known,
    }  # fmt: skip
    title, tree = facts["title"], facts["config"]
    sections = [
        f"<header><h1>{html.escape(title)}</h1>{_lead(columns, resumed)}</header>",
        _tiles(facts["summary"]),
        _curves(columns, resumed),
        _scores(workdir),
        _compression(facts["compression"]),
        _samples(facts["samples"]),
        _data(facts["data"]),
        _section("Configuration", f'<div class="tree mono">{_tree(tree)}</div>' if tree else ""),
        _section("Environment", _facts(facts["environment"], "facts")),
    ]
    replace_file(path, [document(title, sections).encode("utf-8", "replace")])


def _scores(workdir: Path) -> str:
    """What evaluation jobs found of each checkpoint; figures that are the same for all are none."""
    found = read_jobs_scores(workdir)
    raw: dict[str, tuple[list[float], list[float]]] = {}
    for step in sorted(found):
        for name, value in found[step].items():
            steps, values = raw.setdefault(name, ([], []))
            steps.append(step)
            values.append(math.nan if value is None else value)
    series = {name: _series(name, *pair) for name, pair in raw.items()}
    charts = [
        line_chart(name, [one]) for name, one in series.items() if len(np.unique(one.values)) > 1
    ]
    return _section("Scores of checkpoints", _grid(charts))


def _read_columns(path: Path) -> tuple[dict[str, Series], list[int]]:
    """The series by key, and the steps where the run was resumed."""
    raw: dict[str, tuple[array, array]] = {}
    resumed = []
    for _, record in read_records(path):
        step = record["step"]
        if record.get(RESUMED):
            resumed.append(step)
        for key, value in record.items():
            if key in RESERVED or key == RESUMED:
                continue
            if value is None or isinstance(value, int | float):
                steps, values = raw.setdefault(key, (array("d"), array("d")))
                steps.append(step)
                values.append(math.nan if value is None else value)
    return {key: _series(key, *pair) for key, pair in raw.items()}, resumed


def _series(key: str, steps: Sequence[float], values: Sequence[float]) -> Series:
    steps, values = np.asarray(steps), np.asarray(values)
    if (np.diff(steps) <= 0).any():  # written twice: the later record counts
        unique, from_end = np.unique(steps[::-1], return_index=True)
        steps, values = unique, values[::-1][from_end]
    return Series(key, steps, values)


def _lead(columns: Mapping[str, Series], resumed: Sequence[int]) -> str:
    if not columns:
        return '<p class="lead">No metrics were recorded.</p>'
    first = min(s.steps[0] for s in columns.values())
    last = max(s.steps[-1] for s in columns.values())
    count = max(len(s.steps) for s in columns.values())
    text = f"Steps {first:,.0f} to {last:,.0f}, {count:,} record{'s' * (count > 1)}"
    if resumed:
        text += f", resumed {len(resumed)} time{'s' * (len(resumed) > 1)}"
    return f'<p class="lead">{text}.</p>'


def _tiles(summary: Mapping[str, str | float]) -> str:
    tiles = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{_text(value)}</dd></div>"
        for label, value in summary.items()
    )
    rows = math.ceil(len(summary) / MAX_TILE_COLUMNS)
    columns = math.ceil(len(summary) / max(1, rows))  # rows of equal length
    return f'<dl class="tiles" style="--columns:{columns}">{tiles}</dl>' if tiles else ""


def _curves(columns: Mapping[str, Series], resumed: Sequence[int]) -> str:
    def chart(title: str, names: Mapping[str, str], wide: bool = False) -> str:
        lines = [
            Series(name, columns[key].steps, columns[key].values)
            for key, name in names.items()
            if key in columns
        ]
        return line_chart(title, lines, marks=resumed, wide=wide) if lines else ""

    loss = chart("Loss", {"loss": "train", "eval/loss": "held-out"}, wide=True)
    small = [chart(title, {key: title}) for title, key in CHARTS.items()]
    shown = {"loss", "eval/loss", *CHARTS.values()}
    more = []
    for key in columns:
        base = key.removeprefix("eval/")
        if key not in shown:
            shown.update((base, f"eval/{base}"))
            title = base if base in columns else key
            more.append(chart(title, {base: "train", f"eval/{base}": "held-out"}))
    summary = f"<summary>Other metrics ({len(more)})</summary>"
    folded = f"<details>{summary}{_grid(more)}</details>" if more else ""
    body = loss + _grid(small) + folded
    if not body:
        return ""
    box = '<input type="checkbox" class="use-smooth" checked>'
    long = any(len(s.steps) > MAX_DOTS for s in columns.values())
    switch = f'<label class="switch">{box}smooth</label>' if long else ""
    return f'<section><div class="heading"><h2>Training</h2>{switch}</div>{body}</section>'


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _compression(files: Sequence[Mapping[str, Any]]) -> str:
    files = sorted((f for f in files if f.get("model_bpb") is not None), key=_by_model)
    if not files:
        return ""
    shown = files[:: math.ceil(len(files) / MAX_ROWS)]
    top = max(f[key] for f in shown for key in COMPRESSORS if f.get(key) is not None)
    places = ticks(0.0, max(top * 1.02, 0.1), 6)
    end = max(top * 1.02, places[-1])
    rows = "".join(_row(f, end, named=len(shown) <= MAX_NAMED_ROWS) for f in shown)
    size = "" if len(shown) <= MAX_NAMED_ROWS else "--row:5px;--dot:4px;--gap:.5px;--names:0px;"
    step = (places[1] - places[0]) / end if len(places) > 1 else 1
    marks = "".join(
        f'<span style="left:{place / end:.2%}">{label}</span>'
        for place, label in zip(places, tick_labels(places), strict=True)
    )
    keys = "".join(
        f'<span class="key {label.split()[0]}">{label}</span>' for label in COMPRESSORS.values()
    )
    table = _table(["file", "bytes", *COMPRESSORS.values()], [_cells(f) for f in files])
    skipped = (
        f" {len(shown):,} of {len(files):,} files are drawn." if len(shown) < len(files) else ""
    )
    return _section(
        "Compression of held-out files",
        f"<p>{_verdict(files)}{skipped}</p>"
        f'<figure class="compare" style="{size}--step:{step:.4%}">'
        f'<figcaption><h3>Bits per byte</h3><span class="legend">{keys}</span></figcaption>{rows}'
        f'<div class="axis"><span></span><div class="ticks">{marks}</div></div></figure>'
        f"<details><summary>Table of {len(files):,} files</summary>{table}</details>",
    )


def _cells(file: Mapping[str, Any]) -> list[Any]:
    rates = (file.get(key) for key in COMPRESSORS)
    shown = (None if rate is None else f"{rate:.3f}" for rate in rates)
    return [file["name"], file.get("bytes"), *shown]


def _by_model(file: Mapping[str, Any]) -> tuple[float, str]:
    return file["model_bpb"], str(file["name"])


def _verdict(files: Sequence[Mapping[str, Any]]) -> str:
    """The comparison in words, over the files where everything was measured."""
    full = [f for f in files if f.get("bytes") and all(f.get(k) is not None for k in COMPRESSORS)]
    if not full:
        return "Fewer bits per byte is better."
    total = sum(f["bytes"] for f in full)
    model, gzip, xz = (sum(f[k] * f["bytes"] for f in full) / total for k in COMPRESSORS)
    better = sum(f["model_bpb"] < min(f["gzip_bpb"], f["xz_bpb"]) for f in full)
    return (
        f"Over {compact(total)} bytes in {len(full):,} file{'s' * (len(full) > 1)} the model needs "
        f"<b>{model:.3f}</b> bits per byte, gzip -9 {gzip:.3f} and xz -9 {xz:.3f}; the model is "
        f"below both in {better:,} of them. Fewer is better; the model's own size is not counted."
    )


def _row(file: Mapping[str, Any], end: float, *, named: bool) -> str:
    known = {key: file[key] for key in COMPRESSORS if file.get(key) is not None}
    numbers = ", ".join(f"{COMPRESSORS[key]} {value:.3f}" for key, value in known.items())
    low, high = min(known.values()) / end, max(known.values()) / end
    dots = "".join(
        f'<i class="{COMPRESSORS[key].split()[0]}" style="left:{known[key] / end:.2%}"></i>'
        for key in reversed(COMPRESSORS)  # the model's dot on top
        if key in known
    )
    name = html.escape(str(file["name"]))
    return (
        f'<div class="row" title="{name}: {numbers}"><span class="name">{name if named else ""}'
        f'</span><span class="track"><i class="gap" style="left:{low:.2%};right:{1 - high:.2%}"></i>'
        f"{dots}</span></div>"
    )


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    blocks = []
    for sample in samples:
        prompt = sample.get("prompt", "")
        rest = sample["text"].removeprefix(prompt)
        marked = f"<mark>{html.escape(prompt)}</mark>" if prompt else ""
        blocks.append(f'<div class="sample mono">{marked}{html.escape(rest)}</div>')
    return _section("Samples", "".join(blocks))


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(column for source in data.values() for column in source))
    rows = [[name, *(source.get(c) for c in names)] for name, source in data.items()]
    total = None
    if len(rows) > 1 and any(name in SUMMED_COLUMNS for name in names):
        sums = (_sum(data, name) if name in SUMMED_COLUMNS else None for name in names)
        total = ["total", *sums]
    return _section("Data", _table(["source", *names], rows, total) if rows else "")


def _sum(data: Mapping[str, Mapping[str, Any]], column: str) -> float | None:
    values = [source.get(column) for source in data.values()]
    return None if None in values else sum(values)


def _table(head: Sequence[str], rows: Sequence[Sequence], total: Sequence | None = None) -> str:
    def row(cells: Sequence, tag: str) -> str:
        return "".join(f"<{tag}>{_text(cell, exact=True)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    foot = f'<tr class="total">{row(total, "td")}</tr>' if total else ""
    return (
        f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead>'
        f"<tbody>{body}{foot}</tbody></table></div>"
    )


def _tree(value: Mapping[str, Any] | Sequence) -> str:
    """Leaves first, then one folding part per section."""
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    leaves = {str(key): repr(v) for key, v in items if not _is_section(v)}
    parts = "".join(
        f"<details><summary>{html.escape(str(key))}</summary>{_tree(v)}</details>"
        for key, v in items
        if _is_section(v)
    )
    return _facts(leaves, "leaves") + parts


def _is_section(value: Any) -> bool:
    """A list of plain values is a leaf; one that holds sections is a section."""
    if isinstance(value, list | tuple):
        return any(isinstance(v, Mapping) for v in value)
    return isinstance(value, Mapping) and bool(value)


def _facts(facts: Mapping[str, str], name: str) -> str:
    rows = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in facts.items()
    )
    return f'<dl class="{name}">{rows}</dl>' if rows else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _text(value: Any, *, exact: bool = False) -> str:
    """A cell or tile; `exact` keeps every digit of an integer."""
    if value is None:
        return "–"
    if isinstance(value, int) and (exact or abs(value) < 1_000_000):
        return f"{value:,}"
    if isinstance(value, int | float):
        return compact(value)
    return html.escape(str(value))


def _environment() -> dict[str, str]:
    import jax

    devices = jax.devices()
    return {
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
