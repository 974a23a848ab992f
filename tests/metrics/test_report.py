"""The run report and its charts."""

import html.parser
import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.metrics import chart, writer
from llm_jax.metrics.report import FACTS_FILE, REPORT_FILE, write_report

EVIL = """<script>alert("x")</script><img src=x onerror='alert(1)'>&amp;"""
PARTS = {
    "title": "run",
    "config": {},
    "summary": {},
    "samples": [],
    "data": {},
    "compression": None,
    "environment": {"devices": "1 × cpu"},
}
FILES = [
    {"name": "b.txt", "bytes": 300, "model_bpb": 2.0, "gzip_bpb": 3.0, "xz_bpb": 2.5},
    {"name": "a.txt", "bytes": 100, "model_bpb": 1.0, "gzip_bpb": 3.0, "xz_bpb": 2.9},
    {"name": "c.txt", "bytes": 100, "model_bpb": 4.0, "gzip_bpb": 3.0, "xz_bpb": None},
]


class Page(html.parser.HTMLParser):
    """Parses strictly: every tag that opens closes, in order."""

    VOID = ("meta", "input", "br", "path")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.text).append(data)

    @property
    def body(self) -> str:
        return "".join(self.text)


def write_records(workdir, records):
    (workdir / writer.METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))


def report(workdir, records=(), **parts) -> str:
    write_records(workdir, records)
    return write_report(workdir, **PARTS | parts).read_text()


def training(count):
    for step in range(1, count + 1):
        yield {
            "step": step,
            "loss": 3 + 5 / step,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "mfu": 0.4,
        }
        if step % 10 == 0:
            yield {"step": step, "eval/loss": 3.1, "eval/bits_per_byte": 1.0}


def test_a_full_report_is_whole_and_alone(tmp_path):
    text = report(
        tmp_path,
        training(100),
        summary={"Held-out loss": 3.1, "Tokens": 1_234_567_890, "Time": "2h"},
        config={"model": {"name": "gpt", "layers": [{"kind": "moe"}, {"kind": "mlp"}]}, "seed": 1},
        data={"wiki": {"documents": 10, "tokens": 2_000}, "books": {"documents": 5, "epochs": 1.5}},
        samples=[{"prompt": "Once", "text": "Once upon a time"}],
        compression=FILES,
    )
    page = Page(text)
    for expected in ("Held-out loss", "1.235B", "Gradient norm", "'moe'", "1 × cpu", "upon a time"):
        assert expected in page.body
    names = {name for name, _ in page.attributes}
    assert names.isdisjoint({"src", "href", "onload", "onclick"})
    assert not re.search(r"https?:|url\(|@import", text)
    for data in page.scripts[:-1]:
        assert json.loads(data)["lines"]


def test_everything_is_escaped(tmp_path):
    records = [{"step": 1, "loss": 1.0, EVIL: 2.0, f"eval/{EVIL}": 1.0}]
    clean = Page(
        report(tmp_path, [{"step": 1, "loss": 1.0, "x": 2.0, "eval/x": 1.0}], **parts("x"))
    )
    dirty = Page(report(tmp_path, records, **parts(EVIL)))
    assert dirty.tags == clean.tags
    assert [name for name, _ in dirty.attributes] == [name for name, _ in clean.attributes]
    assert dirty.body.count(EVIL) >= 10


def parts(text):
    return {
        "title": text,
        "config": {text: text, "section": {text: {text: [text]}}},
        "summary": {text: text},
        "samples": [{"prompt": text, "text": text + text}],
        "data": {text: {text: text}},
        "compression": [FILES[0] | {"name": text}],
        "environment": {text: text},
    }


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "loss": 10.8}],
        [{"step": 1, "loss": None, "nonfinite": ["loss"]}],
        [{"step": s, "loss": 0.0} for s in range(200)],
        [{"step": s, "loss": (-1) ** s * 3.4e38, "tiny": 5e-324 * s} for s in range(200)],
        [{"step": 7, "eval/loss": 2.0}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_missing_parts_and_odd_numbers(tmp_path, records):
    page = Page(report(tmp_path, records))
    assert ("Training" in page.body) == bool(records)
    assert "nan" not in "".join(v or "" for name, v in page.attributes if name in ("d", "style"))


def test_names_cannot_leave_the_script():
    series = chart.Series(EVIL, np.arange(2.0), np.ones(2))
    page = Page(chart.line_chart("title", [series, series]))
    assert page.tags.count("script") == 1
    assert json.loads(page.scripts[0])["lines"][0]["name"] == EVIL


def test_no_metrics_file(tmp_path):
    page = Page(write_report(tmp_path, **PARTS).read_text())
    assert "No metrics were recorded" in page.body


def test_same_bytes_and_atomic(tmp_path, monkeypatch):
    first = report(tmp_path, training(30))
    assert report(tmp_path, training(30)) == first

    def crash(*_):
        raise OSError("no space")

    monkeypatch.setattr(writer.os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        report(tmp_path, training(40))
    assert (tmp_path / REPORT_FILE).read_text() == first
    assert sorted(os.listdir(tmp_path)) == [writer.METRICS_FILE, REPORT_FILE, FACTS_FILE]


def test_nonfinite_and_resumed_are_marked(tmp_path):
    records = list(training(20))
    records[5] |= {"loss": None, "nonfinite": ["loss"]}
    records[8] |= {"resumed": 1}
    text = report(tmp_path, records)
    body = Page(text).body
    assert "train: not finite in 1 of 20 records, at step 6" in body
    assert "resumed at step 9" in body
    line = re.search(r'class="line s0" d="([^"]*)"', text).group(1)
    assert line.count("M") == 2  # broken once


def test_later_record_of_a_step_counts(tmp_path):
    losses = [(1, 5.0), (2, 9.0), (3, 9.0), (2, 4.0), (3, 3.0)]
    page = Page(report(tmp_path, [{"step": s, "loss": v} for s, v in losses]))
    (line,) = json.loads(page.scripts[0])["lines"]
    assert line["steps"] == [1, 2, 3]
    assert line["values"] == [5.0, 4.0, 3.0]


def test_compression_is_sorted_and_weighted_by_bytes(tmp_path):
    page = Page(report(tmp_path, compression=FILES))
    rows = [v.split(":")[0] for name, v in page.attributes if name == "title"]
    assert rows == ["a.txt", "b.txt", "c.txt"]
    assert (
        "in 2 files the model needs 1.750 bits per byte, gzip -9 3.000 and xz -9 2.600" in page.body
    )
    assert "below both in 2 of them" in page.body


def test_many_files_are_thinned_in_the_picture_only(tmp_path):
    files = [FILES[0] | {"name": f"f{i}", "model_bpb": i / 1000} for i in range(1000)]
    page = Page(report(tmp_path, compression=files))
    assert "250 of 1,000 files are drawn" in page.body
    assert sum(name == "title" for name, _ in page.attributes) == 250
    assert page.tags.count("tr") == 1001


@pytest.mark.parametrize("text", ["Once upon", " upon"])
def test_prompt_stands_once(tmp_path, text):
    html_text = report(tmp_path, samples=[{"prompt": "Once", "text": text}])
    assert "<mark>Once</mark> upon</div>" in html_text


def test_a_spike_survives_downsampling():
    values = np.full(200_001, 3.0)
    values[123_456] = 90.0
    values[7] = np.nan
    series = chart.Series("loss", np.arange(200_001.0), values)
    cut = chart.bucketize(series)
    assert len(cut.steps) <= chart.MAX_BUCKETS
    assert cut.high.max() == 90.0
    assert cut.low.min() == 3.0
    assert np.nanargmax(cut.high) == 123_456 // cut.per_bucket
    np.testing.assert_allclose(np.delete(cut.mean, np.argmax(cut.high)), 3.0)


def test_smoothing_keeps_straight_lines_and_gaps():
    values = np.linspace(5.0, -3.0, 300)
    np.testing.assert_allclose(chart.smoothed(values), values, atol=1e-12)
    values[50] = np.nan
    assert np.flatnonzero(np.isnan(chart.smoothed(values))).tolist() == [50]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e3))
def test_ticks_are_inside_and_labelled_apart(low, relative_width):
    high = low + relative_width * max(abs(low), 1e-3)
    places = chart.ticks(low, high, 5)
    room = 1e-6 * (high - low)
    assert all(low - room <= place <= high + room for place in places)
    assert 2 <= len(places) <= 7
    assert len(set(chart.tick_labels(places))) == len(places)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-9, 1e9), st.floats(3.0, 1e12))
def test_log_ticks_are_inside(low, ratio):
    places = chart.log_ticks(low, low * ratio)
    assert 2 <= len(places) <= 8
    assert all(low * 0.99 <= place <= low * ratio * 1.01 for place in places)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.4128, "3.413"),
        (12_500, "12.5k"),
        (1.2e9, "1.2B"),
        (3e-4, "3e-4"),
        (-2e6, "-2M"),
    ],
)
def test_compact(value, text):
    assert chart.compact(value) == text
    assert chart.compact(math.inf) == "inf"
