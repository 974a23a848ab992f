"""The page holds what the plans hold, is well formed, needs nothing else, and its pictures are to scale."""

import dataclasses
import html.parser
import re
from typing import get_args

import fake_plans
import pytest

from llm_jax.planner import pictures, words
from llm_jax.planner.chips import CHIPS
from llm_jax.planner.page import write_page
from llm_jax.planner.pictures import Bar, Piece
from llm_jax.planner.plan import Part

VOID = {"meta", "rect", "path", "input", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags match, collects text and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        self.open += [tag]

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        while self.open[-1] in VOID and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\xa0", " ").split())


@pytest.fixture
def page(tmp_path):
    def write(plans, **options) -> tuple[str, Page]:
        text = write_page(plans, tmp_path / "plan.html", **options).read_text()
        return text, Page(text)

    return write


def test_one_plan(page):
    _, parsed = page([fake_plans.plan()], title="gpt <1b>")
    for said in (
        "gpt <1b>", "fits: 4.78 of 95.73 GiB per chip (5.0 %)", "584 ms", "MFU over all scores; causal 51.5 %",
        "Live bytes over the schedule", "Roofline", "459 TFLOP/s", "2.77 TB/s", "params.stack.layers.mlp.up",
        "communication data+fsdp", "reduce-scatter", "$13,549", "mesh.rules=zero1", "vocab_size", "libtpu",
        "100 GB/s each way",
    ):  # fmt: skip
        assert said in parsed.text, said
    assert "Side by side" not in parsed.text


def test_several_plans_are_compared_first(page):
    plans = [fake_plans.plan(), fake_plans.too_large(), fake_plans.estimate()]
    _, parsed = page(plans, notes=["v5p wins <because>"])
    text = parsed.text
    assert text.index("Side by side") < text.index("v5p wins <because>") < text.index("fits: ")
    assert "3 plans, 2 of them fit" in text
    assert "does not fit: needs 21.60 GiB of 15.75" in text
    assert text.count("Estimate: estimated by arithmetic") == 1


def test_it_needs_nothing_else(page):
    text, parsed = page([fake_plans.plan(), fake_plans.too_large()])
    assert not [a for a in parsed.attributes if a[1] in ("src", "href")]
    assert "url(" not in text
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert page([fake_plans.plan(), fake_plans.too_large()])[0] == text


def test_tables_and_circles_are_read_without_a_mouse(page):
    """What a circle says when it is pointed at is in a table too, and a heading names its column."""
    plan = fake_plans.plan()
    first = plan.roofline.ops[0]
    ops = tuple(
        dataclasses.replace(first, module=f"stack.layers.{i}", bytes=first.bytes / (i + 1))
        for i in range(13)
    )
    bounds = {"compute": sum(op.exposed * op.times for op in ops)}
    time = dataclasses.replace(
        plan.roofline, ops=ops, bounds=bounds, step_seconds=bounds["compute"]
    )
    text, parsed = page([dataclasses.replace(plan, roofline=time)])
    circles = re.findall(r'class="circle[^>]*title="([^"]*)"', text)
    assert len(circles) == len(ops)
    for title in circles:
        module = re.search(r"stack\.layers\.\d+ ", title)[0]
        rate, intensity = re.search(r"([\d.]+ TFLOP/s), (.*) FLOPs per byte", title).groups()
        assert f"{rate}, {intensity} FLOPs per byte" in parsed.text
        assert module in parsed.text
    assert "3 more" in parsed.text
    assert "<th" in text
    assert not re.findall(r"<th(?! scope=\"col\"|ead)", text)


def test_what_others_wrote_is_escaped(page):
    evil = "<script>alert(1)</script>"
    plan = fake_plans.plan(target=evil, config={"model": {"name": evil}})
    memory = plan.memory
    odd = dataclasses.replace(memory.buffers[0], module=evil, source=evil, change=evil)
    time = plan.roofline
    ops = tuple(dataclasses.replace(op, module=evil, source=evil, bound=evil) for op in time.ops)
    exchanges = tuple(dataclasses.replace(e, tensor=evil, axes=evil) for e in time.exchanges)
    plan = dataclasses.replace(
        plan,
        memory=dataclasses.replace(memory, buffers=(odd,), at=evil),
        roofline=dataclasses.replace(time, ops=ops, exchanges=exchanges, bounds={evil: 1.0}),
        findings=tuple(dataclasses.replace(f, text=evil, source=evil, change=evil) for f in plan.findings),
    )  # fmt: skip
    text, _ = page([plan, plan], title=evil, notes=[evil])
    assert "<script>alert" not in text


def test_every_colour_has_a_value_in_light_and_dark(page):
    text, _ = page([fake_plans.plan()])
    colors = {*pictures.PART_COLORS.values(), *pictures.KIND_COLORS.values()}
    for color in colors:
        assert len(re.findall(rf"--{color}: #[0-9a-f]{{6}}", text)) == 2
    assert set(pictures.PART_COLORS) == set(get_args(Part))


def test_bars_are_to_scale():
    pieces = [Piece("a", "c0", 30.0, "30"), Piece("b", "c1", 10.0, "10")]
    drawn = pictures.stacked_bars(
        [Bar("x", pieces, "40"), Bar("y", pieces[:1], "30", (80.0, "limit"))]
    )
    rects = [
        tuple(float(v) for v in found)
        for found in re.findall(r'x="([\d.]+)" y="0" height="10" width="([\d.]+)"', drawn)
    ]
    assert rects == [(0, 375), (375, 125), (0, 375)]
    assert "left:100.00%" in drawn


def test_the_timeline_keeps_its_peak_and_shows_a_capacity_that_is_near():
    memory = fake_plans.memory()
    spike = 100_000
    points = tuple((i, 2**30 + (2**30 if i == 77_777 else i)) for i in range(spike))
    long = dataclasses.replace(memory, timeline=points, peak=2**31)
    drawn = pictures.timeline(long)
    assert ">2.00 GiB<" in drawn
    assert 'class="dot" style="left:77.78%' in drawn
    assert len(drawn) < 60_000
    assert "capacity" not in drawn
    near = dataclasses.replace(long, capacity=int(2.5 * 2**30))
    assert "capacity 2.50 GiB" in pictures.timeline(near)


def test_circles_lie_where_their_operations_belong():
    """On the roof an operation reaches the peak, on the slope the memory's rate."""
    chip = CHIPS["v5p"]
    op = fake_plans.roofline().ops[0]
    seconds = 1e-3
    at_peak = dataclasses.replace(op, flops=chip.peak_flops * seconds, bytes=1e6, seconds=seconds)
    at_rate = dataclasses.replace(
        op, flops=1e6, bytes=chip.hbm_bytes_per_second * seconds, seconds=seconds, module="other"
    )
    drawn = pictures.roofline_plot([at_peak, at_rate], 1.0, chip)
    tops = [float(t) for t in re.findall(r'class="circle[^>]*top:([\d.]+)%', drawn)]
    lefts = [float(t) for t in re.findall(r'class="circle[^>]*left:([\d.]+)%', drawn)]
    (roof,) = re.findall(r'class="roof" d="M([^"]*)"', drawn)
    corners = [tuple(float(v) for v in point.split()) for point in roof.split("L")]
    assert tops[0] == pytest.approx(corners[1][1] / pictures.HEIGHT * 100, abs=0.1)
    (x0, y0), (x1, y1), _ = corners
    along = (lefts[1] * pictures.WIDTH / 100 - x0) / (x1 - x0)
    assert tops[1] == pytest.approx((y0 + along * (y1 - y0)) / pictures.HEIGHT * 100, abs=0.3)
    assert pictures.roofline_plot([at_peak], 1.0, dataclasses.replace(chip, peak_flops=None)) == ""


def test_plans_without_much_to_say_have_a_page(page):
    bare = dataclasses.replace(fake_plans.memory(), buffers=(), timeline=(), at="", capacity=0)
    _, parsed = page(
        [fake_plans.plan(memory=bare, roofline=None, findings=(), cost=None, chip="cpu")]
    )
    assert "how much there is, is not known" in parsed.text
    _, parsed = page([fake_plans.plan(memory=bare), fake_plans.too_large()])
    assert words.size(bare.peak) in parsed.text


def test_plans_that_differ_in_a_policy_are_told_apart():
    one = fake_plans.plan()
    full = dataclasses.replace(one, config={**one.config, "model": {"remat": "full"}})
    dots = dataclasses.replace(one, config={**one.config, "model": {"remat": "dots"}})
    assert words.labels([full, dots]) == ["remat full", "remat dots"]
    assert words.labels([one, one]) == [f"1: {one.target}", f"2: {one.target}"]
