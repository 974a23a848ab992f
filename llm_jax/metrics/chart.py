"""Charts of the run report as HTML: a line chart over steps and the compression comparison.

A chart has two layers: lines in an SVG that stretches with the page (strokes do not), and ticks as
HTML placed by percentages, so text keeps its size from a phone to paper. Linear and log drawings
are both in the page and CSS shows one of them: a chart works and prints without its script, which
only adds the values under the pointer.

A long series is cut into buckets drawn from their minimum to their maximum, so a spike of one step
out of a million stays in sight.
"""

import dataclasses
import html
import json
import math
from collections.abc import Sequence

import numpy as np

MAX_BUCKETS = 500
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
MAX_DOTS = 60  # more points than this are a line without dots
WIDTH, HEIGHT = 1000, 300  # of the stretched drawing, in its own units
SMOOTHED_FRACTION = 0.04  # of a series' length, the window of its moving average
MIN_LOG_RATIO = 3  # of the highest to the lowest value, below which a log axis shows nothing new


@dataclasses.dataclass(frozen=True)
class Series:
    """One line. steps, values: [P] float64, steps strictly increasing, NaN where not finite."""

    name: str
    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A series cut to at most MAX_BUCKETS pieces; all [Q] float64, NaN for a piece of NaN."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_bucket: int


def line_chart(
    title: str, series: Sequence[Series], *, marks: Sequence[float] = (), wide: bool = False
) -> str:
    """A figure with one line per series.

    Args:
      series: at least one, each with at least one point.
      marks: steps where the run was resumed, drawn as dashed rules.
      wide: over the whole page, on a log axis at first, with a note on how to read it.
    """
    buckets = [bucketize(s) for s in series]
    first, last = _span([b.steps for b in buckets], pad=0.0)
    x_of = _Scale(first, last, log=False)
    views = [_view("linear", buckets, x_of, marks)]
    low, high = _positive_span(buckets)
    if high / low > MIN_LOG_RATIO:
        views.append(_view("log", buckets, x_of, marks))
    switch = _log_switch(checked=wide) if len(views) > 1 else ""
    notes = _losses(series) + (_reading(buckets, marks) if wide else [])
    note = f'<p class="note">{html.escape("; ".join(notes))}</p>' if notes else ""
    places = ticks(first, last, 5)
    x_ticks = "".join(
        f'<span style="left:{x_of(place):.2%}">{label}</span>'
        for place, label in zip(places, tick_labels(places), strict=True)
    )
    return (
        f'<figure class="chart{" wide" if wide else ""}"><figcaption><h3>{html.escape(title)}</h3>'
        f'{_legend(series)}{switch}</figcaption><div class="frame">{"".join(views)}'
        f'<div class="hover"><i class="rule"></i><div class="tip"></div></div></div>'
        f'<div class="x-axis">{x_ticks}</div>{note}{_points(series, buckets, first, last)}</figure>'
    )


def bucketize(series: Series) -> Buckets:
    """Cuts a series to at most MAX_BUCKETS buckets of equally many points."""
    count = len(series.steps)
    per_bucket = max(1, math.ceil(count / MAX_BUCKETS))
    starts = np.arange(0, count, per_bucket)
    known = np.isfinite(series.values)
    # In each bucket's own scale a sum cannot overflow, whatever a diverged loss became.
    low = np.fmin.reduceat(series.values, starts)
    high = np.fmax.reduceat(series.values, starts)
    scale = np.fmax(np.maximum(np.abs(low), np.abs(high)), 1e-300)
    scaled = np.where(known, series.values, 0.0) / np.repeat(scale, per_bucket)[:count]
    number = np.add.reduceat(known.astype(float), starts)
    mean = np.add.reduceat(np.nan_to_num(scaled), starts) / np.maximum(number, 1) * scale
    steps = np.add.reduceat(series.steps, starts) / np.diff([*starts, count])
    return Buckets(steps, np.where(number > 0, mean, np.nan), low, high, per_bucket)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average of [Q] values with Hann weights. The window shrinks towards both ends,
    so that neither end is bent; NaN is left out.
    """
    count = len(values)
    reach = max(1, round(count * SMOOTHED_FRACTION / 2))
    result = np.full(count, np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        half = min(i, count - 1 - i, reach)
        window = values[i - half : i + half + 1]
        weights = np.hanning(2 * half + 3)[1:-1] * np.isfinite(window)
        result[i] = (np.nan_to_num(window) * (weights / weights.sum())).sum()
    return result


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    if raw < 1e-300:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with round numbers between them where these are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 6)):
        found = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        found = [place for place in found if low <= place <= high]
        if len(found) > 3:
            return found[:: math.ceil(len(found) / 7)]
    return [place for place in ticks(low, high, 4) if place > 0]


def compact(value: float, digits: int = 4) -> str:
    """A number for a tile: 12.5k, 1.2B, 0.03, 3e-4."""
    size = abs(value)
    if value == 0 or 1e-2 <= size < 9999.5 or not math.isfinite(value):
        return f"{value:.{digits}g}"
    for limit, suffix in SUFFIXES:
        if limit <= size < 1e15:
            return f"{value / limit:.{digits}g}{suffix}"
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    return f"{float(mantissa):.{digits}g}e{int(exponent)}"


def tick_labels(places: Sequence[float]) -> list[str]:
    """The ticks of one axis: in one unit (2.5k, 5k, 7.5k, 10k), no two alike."""
    labels: list[str] = []
    for digits in range(4, 16):
        labels = _labels(places, digits)
        if len(set(labels)) == len(labels):
            break
    return labels


def _labels(places: Sequence[float], digits: int) -> list[str]:
    top = max(map(abs, places))
    if 1e4 <= top < 1e15 and top < 1e4 * min(abs(place) for place in places if place):
        limit, suffix = next(unit for unit in SUFFIXES if unit[0] <= top)
        return [f"{p / limit:.{digits}g}{suffix}" if p else "0" for p in places]
    return [compact(place, digits) for place in places]


class _Scale:
    """Maps [low, high] to 0..1."""

    def __init__(self, low: float, high: float, *, log: bool):
        self._log = log
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)

    def __call__(self, value):
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.log(value) if self._log else value
        if self._high == self._low:
            return value * 0 + 0.5
        return (value - self._low) / (self._high - self._low)


def _span(arrays: Sequence[np.ndarray], pad: float) -> tuple[float, float]:
    finite = [a[np.isfinite(a)] for a in arrays]
    finite = [a for a in finite if len(a)]
    if not finite:
        return 0.0, 1.0
    low, high = min(a.min() for a in finite), max(a.max() for a in finite)
    room = (high - low) * pad if high > low else abs(high) * pad
    return float(low - room), float(high + room)


def _positive_span(buckets: Sequence[Buckets]) -> tuple[float, float]:
    extremes = [a for b in buckets for a in (b.low, b.high)]
    low, high = _span([a[a > 0] for a in extremes], pad=0.0)
    return (low, high) if low > 0 else (1.0, 1.0)


def _view(kind: str, buckets: Sequence[Buckets], x_of: _Scale, marks: Sequence[float]) -> str:
    extremes = [a for b in buckets for a in (b.low, b.high)]
    if kind == "log":
        low, high = _positive_span(buckets)
        room = (high / low) ** 0.05
        low, high = low / room, high * room
        places = log_ticks(low, high)
    else:
        low, high = _span(extremes, pad=0.05)
        lowest, highest = _span(extremes, pad=0.0)
        if low < 0 <= lowest:
            low = 0.0
        places = ticks(low, high, 4) if highest > lowest else [lowest]
    y_of = _Scale(low, high, log=kind == "log")
    heights = [1 - y_of(place) for place in places]
    labels = "".join(
        f'<span style="top:{height:.2%}">{label}</span>'
        for height, label in zip(heights, tick_labels(places), strict=True)
    )
    grid = "".join(f"M0 {height * HEIGHT:.1f}H{WIDTH}" for height in heights)
    rules = "".join(f"M{x_of(m) * WIDTH:.1f} 0V{HEIGHT}" for m in marks)
    lines = "".join(_line(i, b, x_of, y_of) for i, b in enumerate(buckets))
    return (
        f'<div class="view {kind}"><div class="y-axis">{labels}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/><path class="mark" d="{rules}"/>{lines}</svg></div>'
    )


def _line(index: int, buckets: Buckets, x_of: _Scale, y_of: _Scale) -> str:
    steps = buckets.steps
    if len(steps) <= MAX_DOTS:
        line = _path(steps, buckets.mean, x_of, y_of)
        dots = _path(steps, buckets.mean, x_of, y_of, dots=True)
        return f'<path class="line s{index}" d="{line}"/><path class="dots s{index}" d="{dots}"/>'
    if buckets.per_bucket > 1:
        both = np.stack([buckets.low, buckets.high], axis=1).ravel()  # [2Q]
        raw = _path(np.repeat(steps, 2), both, x_of, y_of)
    else:
        raw = _path(steps, buckets.mean, x_of, y_of)
    smooth = _path(steps, smoothed(buckets.mean), x_of, y_of)
    return f'<path class="raw s{index}" d="{raw}"/><path class="smooth s{index}" d="{smooth}"/>'


def _path(
    steps: np.ndarray, values: np.ndarray, x_of: _Scale, y_of: _Scale, dots: bool = False
) -> str:
    """SVG path data; a value that cannot be drawn breaks the line."""
    x, y = x_of(steps) * WIDTH, (1 - y_of(values)) * HEIGHT
    pieces, pen_down = [], False
    for x_i, y_i in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(y_i):
            pen_down = False
            continue
        if dots:
            pieces.append(f"M{x_i:.1f} {y_i:.1f}h.01")  # a round cap makes it a dot
        else:
            pieces.append(f"{'L' if pen_down else 'M'}{x_i:.1f} {y_i:.1f}")
        pen_down = True
    return "".join(pieces)


def _legend(series: Sequence[Series]) -> str:
    items = []
    for i, s in enumerate(series):
        known = s.values[np.isfinite(s.values)]
        last = compact(float(known[-1])) if len(known) else "not finite"
        name = f'<span class="key s{i}">{html.escape(s.name)}</span> ' if len(series) > 1 else ""
        items.append(f"<span>{name}<b>{last}</b></span>")
    return f'<span class="legend">{"".join(items)}</span>'


def _log_switch(checked: bool) -> str:
    box = f'<input type="checkbox" class="use-log"{" checked" if checked else ""}>'
    return f'<label class="switch">{box}log</label>'


def _losses(series: Sequence[Series]) -> list[str]:
    notes = []
    for s in series:
        lost = s.steps[~np.isfinite(s.values)]
        if len(lost):
            where = f"{'first ' if len(lost) > 1 else ''}at step {lost[0]:,.0f}"
            notes.append(
                f"{s.name}: not finite in {len(lost):,} of {len(s.steps):,} records, {where}"
            )
    return notes


def _reading(buckets: Sequence[Buckets], marks: Sequence[float]) -> list[str]:
    notes = []
    widest = max(b.per_bucket for b in buckets)
    if widest > 1:
        notes.append(f"each column spans the lowest to the highest of {widest:,} records")
    if marks:
        more = f" and {len(marks) - 8} more" if len(marks) > 8 else ""
        notes.append("dashed: resumed at step " + ", ".join(f"{m:,.0f}" for m in marks[:8]) + more)
    return notes


def _points(series: Sequence[Series], buckets: Sequence[Buckets], first: float, last: float) -> str:
    """What the script shows under the pointer."""
    lines = [
        {
            "name": s.name,
            "steps": [round(x) for x in b.steps.tolist()],
            "values": [None if math.isnan(v) else float(f"{v:.5g}") for v in b.mean.tolist()],
        }
        for s, b in zip(series, buckets, strict=True)
    ]
    data = json.dumps({"first": first, "last": last, "lines": lines}, separators=(",", ":"))
    return f'<script type="application/json">{data.replace("<", chr(92) + "u003c")}</script>'
