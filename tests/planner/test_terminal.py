"""The terminal report says what a plan holds, on any width, and never breaks a line of its own."""

import dataclasses
import io

import fake_plans
import pytest
from rich.console import Console

from llm_jax.planner import words
from llm_jax.planner.plan import Finding
from llm_jax.planner.terminal import show_plan, show_ranking


def shown(show, *arguments, width=80, **options) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    show(*arguments, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_all_that_was_found_is_said(width):
    plan = fake_plans.plan()
    text = " ".join(shown(show_plan, plan, width=width).split())
    time = plan.roofline
    for part in plan.memory.parts:
        assert part in text
    for said in (
        "fits: 4.78 of 95.73 GiB per chip (5.0 %)",
        f"{time.tokens_per_second:,.0f} tokens/s per chip",
        "MFU 55.2 % (all scores), 51.5 % (causal scores)",
        "bound by compute (94",
        "4 × bf16[24,8,2048,2048]",
        "model.remat=full saves 878 MiB",
        "24×2048×5632 [-, -, fsdp]",
        "communication data+fsdp",
        "all-gather",
        "parameter params.stack.layers.mlp.up",
        "mesh.rules=zero1",
        "2.10 days, 3,226 chip-hours, $13,549 at $4.2 per chip-hour",
        "list price of us-east5 as of 2026-11",
        "libtpu 0.0.42.1",
        "the compiler's own cycles 87.6 %, models of kernels 9.9 %",
        "all divided by 0.93",
    ):
        assert said in text, said


def test_what_does_not_fit_begins_with_the_answer():
    plan = fake_plans.too_large()
    lines = shown(show_plan, plan).splitlines()
    assert lines[0] == "does not fit: needs 21.60 GiB of 15.75 per chip (37.1 % over)"
    assert lines[1] == "to make it fit: --config.train.accumulate_steps=2"
    other = Finding("replicated", "a weight is whole", change="mesh.rules=zero1")
    hopeless = dataclasses.replace(plan, findings=(Finding("memory", "too much"), other))
    assert "to make it fit" not in shown(show_plan, hopeless)


def test_a_few_bytes_too_many_are_told_as_such():
    plan = fake_plans.too_large()
    capacity = plan.memory.capacity
    said = {
        capacity + 4 * 2**20: "does not fit: needs 15.75 GiB of 15.75 per chip (4.00 MiB over)",
        capacity + 6 * 2**20: "does not fit: needs 15.76 GiB of 15.75 per chip (6.00 MiB over)",
        capacity + 1: "does not fit: needs 15.75 GiB of 15.75 per chip (1 B over)",
        capacity + 2**25: "does not fit: needs 15.78 GiB of 15.75 per chip (0.2 % over)",
    }
    for peak, text in said.items():
        memory = dataclasses.replace(plan.memory, peak=peak)
        assert words.verdict(dataclasses.replace(plan, memory=memory)) == text


def test_where_no_price_is_known_no_dollars_are_shown():
    plan = fake_plans.plan()
    cost = dataclasses.replace(plan.cost, dollars=None, dollars_per_chip_hour=None)
    plan = dataclasses.replace(plan, cost=cost)
    text = shown(show_plan, plan)
    assert "2.10 days, 3,226 chip-hours on 64 chips" in text
    assert "$" not in text
    assert "$" not in shown(show_ranking, [plan])
    free = dataclasses.replace(cost, dollars=0.0, dollars_per_chip_hour=0.0)
    assert "$0.00 at $0 per chip-hour" in shown(show_plan, dataclasses.replace(plan, cost=free))


def test_what_is_tiny_takes_no_row():
    plan = fake_plans.plan()
    parts = {**plan.memory.parts, "batch": 4096}
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, parts=parts))
    tiny = dataclasses.replace(
        plan.roofline.exchanges[0], tensor="a scalar", seconds=1e-9, exposed=0.0
    )
    plan = dataclasses.replace(plan, roofline=dataclasses.replace(plan.roofline, exchanges=(tiny,)))
    text = shown(show_plan, plan)
    assert "and batch 4.00 KiB" in text
    assert "\nbatch" not in text
    assert "a scalar" not in text
    assert "1, none of which takes 0.1 % of the step" in text


def test_an_estimate_says_so_first():
    text = shown(show_plan, fake_plans.estimate())
    assert text.startswith("ESTIMATE: ")
    assert "ESTIMATE" not in shown(show_plan, fake_plans.plan())
    table = shown(show_ranking, [fake_plans.estimate(), fake_plans.plan()])
    assert "~584 ms" in table
    assert table.count("~28,") == 1


@pytest.mark.parametrize("width", [60, 80, 149, 150, 200])
def test_nothing_is_wider_than_the_terminal(width):
    for plan in (fake_plans.plan(), fake_plans.too_large(), fake_plans.estimate()):
        for line in shown(show_plan, plan, width=width).splitlines():
            assert len(line) <= width


def test_no_colour_off_a_terminal_and_markup_is_text():
    plan = fake_plans.plan()
    odd = dataclasses.replace(plan.memory.buffers[0], module="[bold]a[/] [x]")
    plan = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, buffers=(odd,)))
    for width in (80, 200):
        text = shown(show_plan, plan, width=width)
        assert "\x1b" not in text
        assert "[bold]a[/] [x]" in text
    assert "\x1b[" in shown(show_plan, plan, force_terminal=True, color_system="standard")


def test_bars_follow_one_another_and_end_at_the_total():
    """A piece begins in the column where the one above it ended, or in that column's last character."""
    lines = shown(show_plan, fake_plans.plan()).splitlines()
    first = lines.index("Memory per chip at the peak, 4.78 GiB") + 1
    end = None
    last = next(i for i, line in enumerate(lines) if line.startswith("of capacity"))
    assert last - first > 5
    for line in lines[first:last]:
        start, stop = line.index("█"), line.rindex("█") + 1
        assert end is None or end - 1 <= start <= end
        end = stop


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_ranking_keeps_the_order_and_drops_empty_columns(width):
    plans = [fake_plans.too_large(), fake_plans.plan()]
    text = shown(show_ranking, plans, width=width)
    assert text.index("v5e:4x4") < text.index("v5p:4x4x4")
    assert "$13,549" in text
    assert "2.10" in text
    assert "try train.accumulate_steps=2" in text
    bare = [dataclasses.replace(plan, cost=None) for plan in plans]
    assert "dollars" not in shown(show_ranking, bare, width=200)
    assert max(map(len, text.splitlines())) <= width
    assert shown(show_ranking, []) == ""


def test_alike_operations_of_many_layers_are_one():
    time = fake_plans.roofline()
    layers = [dataclasses.replace(time.ops[0], name=f"fusion.{i}", times=1) for i in range(24)]
    rolled = dataclasses.replace(time, ops=(time.ops[0],))
    unrolled = dataclasses.replace(time, ops=tuple(layers))
    (one,), (other,) = words.dearest_ops(rolled, 5), words.dearest_ops(unrolled, 5)
    assert other.times == one.times == 24
    assert other.seconds == pytest.approx(one.seconds)
    assert other.flops == pytest.approx(one.flops)


def test_alike_arrays_are_one():
    memory = fake_plans.memory()
    groups = words.largest_buffers(memory, 10)
    assert [count for count, _ in groups] == [4, 4, 4]
    assert sum(b.bytes for _, b in groups) == sum(b.bytes for b in memory.buffers)
    assert [b.bytes for _, b in groups] == sorted((b.bytes for _, b in groups), reverse=True)


def test_passes_hold_all_operations():
    time = fake_plans.roofline()
    passes = words.by_direction(time)
    assert list(passes) == ["forward", "backward", "optimizer", "other"]
    total = sum(sum(bounds.values()) for bounds in passes.values())
    assert total == pytest.approx(time.step_seconds)
    bare = dataclasses.replace(time, ops=())
    assert words.by_direction(bare) == {"step": words.ordered_bounds(time.bounds)}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.size(0), "0 B"), (words.size(1023), "1023 B"), (words.size(2**20), "1.00 MiB"),
        (words.size(1023.9 * 2**20), "1.00 GiB"), (words.size(5.5 * 2**30), "5.50 GiB"),
        (words.duration(0), "0 s"), (words.duration(9.996e-3), "10.0 ms"), (words.duration(1.5e-7), "150 ns"),
        (words.duration(75), "75.0 s"), (words.percent(0.9999), "100 %"), (words.percent(0.0312), "3.1 %"),
        (words.rate(4.59e14), "459 T"), (words.amount(1.367e9), "1.37 B"), (words.days(0.25), "6.00 hours"),
        (words.days(0.01), "14.4 minutes"), (words.days(3.14), "3.14 days"),
        (words.money(99.5), "$99.50"), (words.money(0), "$0.00"), (words.money(0.0123), "$0.0123"),
        (words.mesh_sizes({"data": 1, "fsdp": 1}), "one device"),
        (words.mesh_sizes({"data": 2, "pipeline": 1, "fsdp": 8}), "data 2 × fsdp 8"),
    ],
)  # fmt: skip
def test_words(said, expected):
    assert said == expected
