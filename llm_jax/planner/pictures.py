"""The pictures of a plan's page: stacked bars, live bytes over the schedule, the roofline.

Shapes are drawn in an SVG that stretches with the page, text is HTML placed by percentages, so it keeps
its size from a phone to paper. Every shape says what it is in a `title`. Colours are classes, c0 to c10;
page.py gives them values for light and dark.
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

from llm_jax.metrics.chart import compact, log_ticks, tick_labels, ticks
from llm_jax.planner import words
from llm_jax.planner.chips import Chip
from llm_jax.planner.plan import Memory, Op, Plan

PART_COLORS = {
    "parameters": "c0", "optimizer": "c1", "gradients": "c2", "activations": "c3", "logits": "c4",
    "attention": "c5", "collectives": "c6", "batch": "c7", "temporaries": "c8", "unused": "c9",
    "frozen": "c10",
}  # fmt: skip
KIND_COLORS = {
    "matmul": "c0", "attention": "c5", "kernel": "c6", "elementwise": "c4", "copy": "c8", "other": "c7",
}  # fmt: skip
_BOUND_COLORS = {"compute": "c2", "memory": "c0", "other": "c8"}
_COMMUNICATION_COLORS = ("c3", "c4", "c5", "c6")
WIDTH, HEIGHT = 1000, 400  # of the stretched drawings, in their own units
MAX_CIRCLES = 60
LARGEST_CIRCLE, SMALLEST_CIRCLE = 64.0, 6.0  # pixels across
STEP_CIRCLE = 140.0  # of what takes the whole step; an area is a share of time
# A page's usual frame in pixels, by which numbers are kept apart.
_FRAME = (940, 380)
_APART = 15
NUMBERED = 10
MAX_POINTS = 1500  # of a timeline
_NEAR = 1.7  # how many times the peak the capacity may be to be drawn in the timeline


@dataclasses.dataclass(frozen=True)
class Piece:
    """A segment of a stacked bar. value: in the bar's unit; said: the same in words."""

    name: str
    color: str
    value: float
    said: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """label: before the bar; said: after it; mark: a value where a line crosses the bar, with its name."""

    label: str
    pieces: Sequence[Piece]
    said: str
    mark: tuple[float, str] | None = None


def memory_pieces(memory: Memory, unit: float = 1.0) -> list[Piece]:
    """The parts in bytes, times `unit`."""
    return [
        Piece(name, PART_COLORS[name], count * unit, words.size(count))
        for name, count in words.ordered_parts(memory).items()
    ]


def bound_colors(plans: Sequence[Plan]) -> dict[str, str]:
    """A colour for each bound that any of the plans has; the same in all of them."""
    colors = dict(_BOUND_COLORS)
    for plan in plans:
        for name in words.ordered_bounds(plan.roofline.bounds) if plan.roofline else ():
            place = len(colors) - len(_BOUND_COLORS)
            colors.setdefault(name, _COMMUNICATION_COLORS[place % len(_COMMUNICATION_COLORS)])
    return colors


def bound_pieces(bounds: Mapping[str, float], colors: Mapping[str, str]) -> list[Piece]:
    return [Piece(name, colors[name], s, words.duration(s)) for name, s in bounds.items()]


def stacked_bars(bars: Sequence[Bar]) -> str:
    """Bars over each other on one scale, from zero to the longest bar or mark."""
    ends = [sum(p.value for p in bar.pieces) for bar in bars]
    ends += [bar.mark[0] for bar in bars if bar.mark]
    end = max(ends) or 1.0
    rows = []
    for bar in bars:
        rects, start = [], 0.0
        for piece in bar.pieces:
            title = html.escape(f"{piece.name}: {piece.said}")
            rects.append(
                f'<rect class="{piece.color}" x="{start / end * WIDTH:.2f}" y="0" height="10" '
                f'width="{piece.value / end * WIDTH:.2f}"><title>{title}</title></rect>'
            )
            start += piece.value
        mark = ""
        if bar.mark:
            side = "before" if bar.mark[0] > 0.6 * end else "after"
            mark = (
                f'<i class="limit {side}" style="left:{bar.mark[0] / end:.2%}">'
                f"<span>{html.escape(bar.mark[1])}</span></i>"
            )
        rows.append(
            f'<div class="bar{" marked" if mark else ""}"><span class="bar-name">'
            f'{html.escape(bar.label)}</span><span class="bar-track"><svg viewBox="0 0 {WIDTH} 10" '
            f'preserveAspectRatio="none" role="img" aria-label="{html.escape(_spoken(bar))}">'
            f'{"".join(rects)}</svg>{mark}</span><span class="bar-said">{html.escape(bar.said)}</span></div>'
        )  # fmt: skip
    return f'<div class="bars">{"".join(rows)}</div>'


def _spoken(bar: Bar) -> str:
    return f"{bar.label}: " + ", ".join(f"{p.name} {p.said}" for p in bar.pieces)


def legend(pieces: Sequence[Piece], total: float) -> str:
    """The pieces of one bar with their amounts and shares."""
    items = "".join(
        f'<div><i class="swatch {p.color}"></i><span>{html.escape(p.name)}</span><b>{p.said}</b>'
        f'<span class="soft">{words.percent(p.value / total)}</span></div>'
        for p in pieces
    )
    return f'<div class="pieces">{items}</div>'


def keys(colors: Mapping[str, str]) -> str:
    """Names of colours, without amounts."""
    items = "".join(
        f'<span><i class="swatch {color}"></i>{html.escape(name)}</span>'
        for name, color in colors.items()
    )
    return f'<div class="keys">{items}</div>'


def timeline(memory: Memory) -> str:
    """Bytes alive over the schedule, the peak marked, and the capacity where it is near."""
    points = _thinned(memory.timeline)
    first, last = memory.timeline[0][0], memory.timeline[-1][0]
    near = memory.capacity and memory.capacity <= _NEAR * memory.peak
    top = 1.08 * max(memory.peak, memory.capacity if near else 0)
    x_of = lambda place: (place - first) / (last - first)  # noqa: E731
    y_of = lambda count: 1 - count / top  # noqa: E731
    path = f"M0 {HEIGHT}V{y_of(points[0][1]) * HEIGHT:.1f}"
    for place, count in points[1:]:  # what is alive stays so until the next change
        path += f"H{x_of(place) * WIDTH:.1f}V{y_of(count) * HEIGHT:.1f}"
    path += f"H{WIDTH}V{HEIGHT}Z"
    shapes = f'<path class="area c0" d="{path}"/>'
    texts = ""
    if near:
        y = y_of(memory.capacity)
        shapes += f'<path class="limit" d="M0 {y * HEIGHT:.1f}H{WIDTH}"/>'
        texts += _note(0.0, y, f"capacity {words.gib(memory.capacity)} GiB", "above")
    at, most = max(points, key=lambda point: point[1])
    texts += f'<i class="dot" style="left:{x_of(at):.2%};top:{y_of(most):.2%}"></i>'
    side = "before" if x_of(at) > 0.5 else "after"
    texts += _note(x_of(at), y_of(most), f"{words.gib(most)} GiB", side)
    heights = {y_of(v * words.GIB): v for v in ticks(0, top / words.GIB, 4)}
    places = {x_of(place): place for place in ticks(first, last, 5)}
    return _plot(
        "Live bytes over the schedule",
        shapes, texts, _labelled(places), _labelled(heights),
        "GiB per chip", "instruction of the schedule",
    )  # fmt: skip


def _thinned(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most MAX_POINTS, the highest of each stretch, so that the peak stays."""
    stretch = math.ceil(len(points) / MAX_POINTS)
    return [
        max(points[i : i + stretch], key=lambda point: point[1])
        for i in range(0, len(points), stretch)
    ]


def roofline_plot(ops: Sequence[Op], step_seconds: float, chip: Chip) -> str:
    """FLOP/s over FLOPs per byte, both logarithmic; a circle is an operation, as large as its time.

    Args:
      ops: the dearest first; the first NUMBERED bear their numbers.
    """
    drawn = [op for op in ops if _has_place(op)][:MAX_CIRCLES]
    if not drawn or not chip.peak_flops or not chip.hbm_bytes_per_second:
        return ""
    peak, bandwidth = chip.peak_flops, chip.hbm_bytes_per_second
    ridge = peak / bandwidth
    intensities = [op.flops / op.bytes for op in drawn] + [ridge]
    rates = [op.flops / op.seconds for op in drawn] + [peak]
    x_of = _LogScale(min(intensities) / 2, max(*intensities, 4 * ridge) * 2)
    y_of = _LogScale(min(rates) / 2, max(rates) * 1.6)
    texts = _note(x_of(ridge), 1 - y_of(peak), f"{words.rate(peak)}FLOP/s", "above")
    slope = x_of.low * (ridge / x_of.low) ** 0.5
    along = f"{words.rate(bandwidth)}B/s"
    texts += _note(x_of(slope), 1 - y_of(slope * bandwidth), along, "before")
    numbers = {id(op): i for i, op in enumerate(ops[:NUMBERED], 1)}
    texts += _circles(drawn, numbers, step_seconds, x_of, y_of)
    x_labels = {x_of(v): v for v in log_ticks(x_of.low, x_of.high)}
    y_labels = {1 - y_of(v): v / 1e12 for v in log_ticks(y_of.low, y_of.high)}
    kinds = {
        kind: color for kind, color in KIND_COLORS.items() if any(o.kind == kind for o in drawn)
    }
    return _plot(
        "Roofline", _roofs(x_of, y_of, peak, bandwidth), texts, _labelled(x_labels),
        _labelled(y_labels), "TFLOP/s", "FLOPs per byte of HBM", keys(kinds),
    )  # fmt: skip


def _circles(
    ops: Sequence[Op],
    numbers: Mapping[int, int],
    step_seconds: float,
    x_of: "_LogScale",
    y_of: "_LogScale",
) -> str:
    """numbers: by id of the operation."""
    circles, labels = "", ""
    taken: list[tuple[float, float]] = []
    for op in ops:
        x, y = x_of(op.flops / op.bytes), 1 - y_of(op.flops / op.seconds)
        share = op.exposed * op.times / step_seconds
        across = min(max(STEP_CIRCLE * math.sqrt(share), SMALLEST_CIRCLE), LARGEST_CIRCLE)
        circles += _circle(op, x, y, across, share)
        if id(op) in numbers:
            dx, dy = _free_place(x * _FRAME[0], y * _FRAME[1], across, taken)
            labels += (
                f'<b class="number" style="left:{x:.2%};top:{y:.2%};'
                f'translate:{dx:.0f}px {dy:.0f}px">{numbers[id(op)]}</b>'
            )
    return circles + labels  # numbers lie over all circles


def _has_place(op: Op) -> bool:
    return op.flops > 0 and op.bytes > 0 and op.seconds > 0 and op.kind in KIND_COLORS


def _roofs(x_of: "_LogScale", y_of: "_LogScale", peak: float, bandwidth: float) -> str:
    """Up along the memory's rate, then level at the peak."""
    start = max(x_of.low, y_of.low / bandwidth)
    corners = [(start, start * bandwidth), (peak / bandwidth, peak), (x_of.high, peak)]
    path = "L".join(f"{x_of(x) * WIDTH:.1f} {(1 - y_of(y)) * HEIGHT:.1f}" for x, y in corners)
    return f'<path class="roof" d="M{path}"/>'


def _free_place(
    x: float, y: float, across: float, taken: list[tuple[float, float]]
) -> tuple[float, float]:
    """Where a number goes, from the middle of its circle, in pixels: there if it fits, else around it."""
    around = [(r, a) for r in (across / 2 + 9, across / 2 + 24) for a in range(-90, 270, 30)]
    places = [(0.0, 0.0)] if across >= _APART else []
    places += [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for r, a in around]
    free = (
        (dx, dy)
        for dx, dy in places
        if all(math.hypot(x + dx - i, y + dy - j) >= _APART for i, j in taken)
    )
    dx, dy = next(free, places[-1])
    taken.append((x + dx, y + dy))
    return dx, dy


def _circle(op: Op, x: float, y: float, across: float, share: float) -> str:
    said = (
        f"{op.kind}, {op.direction}: {op.module} {words.work(op)}; {words.percent(share)} of the step, "
        f"{words.rate(op.flops / op.seconds)}FLOP/s, {compact(op.flops / op.bytes)} FLOPs per byte"
    )
    return (
        f'<i class="circle {KIND_COLORS[op.kind]}" title="{html.escape(said)}" style="left:{x:.2%};'
        f'top:{y:.2%};width:{across:.0f}px;height:{across:.0f}px"></i>'
    )


@dataclasses.dataclass(frozen=True)
class _LogScale:
    """Maps [low, high] to 0..1."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)


def _labelled(places: Mapping[float, float]) -> dict[float, str]:
    """Texts by place, a share of the axis."""
    return dict(zip(places, tick_labels(list(places.values())), strict=True))


def _note(x: float, y: float, text: str, side: str) -> str:
    style = f"left:{x:.2%};top:{y:.2%}"
    return f'<span class="note-at {side}" style="{style}">{html.escape(text.strip())}</span>'


def _plot(
    title: str,
    shapes: str,
    texts: str,
    x_labels: Mapping[float, str],
    y_labels: Mapping[float, str],
    y_name: str,
    x_name: str,
    caption: str = "",
) -> str:
    grid = "".join(f"M0 {y * HEIGHT:.1f}H{WIDTH}" for y in y_labels)
    left = "".join(f'<span style="top:{y:.2%}">{text}</span>' for y, text in y_labels.items())
    below = "".join(f'<span style="left:{x:.2%}">{text}</span>' for x, text in x_labels.items())
    return (
        f'<figure class="plot"><figcaption><h3>{html.escape(title)}</h3>{caption}</figcaption>'
        f'<div class="axis-name">{html.escape(y_name)}</div>'
        f'<div class="frame"><div class="view"><div class="y-axis">{left}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(title)}"><path class="grid" d="{grid}"/>{shapes}</svg>{texts}'
        f'</div></div><div class="x-axis">{below}</div>'
        f'<div class="axis-name x">{html.escape(x_name)}</div></figure>'
    )
