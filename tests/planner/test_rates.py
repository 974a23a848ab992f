"""What a device at hand can do: measured where no table has it, and what becomes of it."""

import dataclasses
import io
import json

import jax
import pytest
from rich.console import Console
from small_step import compile_small

from llm_jax.planner.chips import CHIPS, CORE_LINKS, chip_of
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.make import make_plan
from llm_jax.planner.rates import measure_rates
from llm_jax.planner.terminal import show_plan
from llm_jax.planner.topology import parse_target

MEASURED = {"peak_flops": 5e11, "bytes_per_second": 8e9}


def test_a_cpu_is_measured_and_shared():
    device = jax.devices()[0]
    rates = measure_rates(device, "float32")
    together = {name: rate * jax.local_device_count() for name, rate in rates.items()}
    # From one slow core to a large server.
    assert 1e9 < together["peak_flops"] < 1e14
    assert 5e8 < together["bytes_per_second"] < 2e12


def test_rates_that_no_table_has():
    chip = chip_of("cpu", 10, MEASURED)
    assert (chip.peak_flops, chip.hbm_bytes_per_second) == (5e11, 8e9)
    assert chip.link_bytes_per_second * CORE_LINKS == 8e9
    unknown = chip_of("NVIDIA GeForce RTX 4090", 10, MEASURED)
    assert unknown.peak_flops == 165.2e12, "its peak is known"
    assert unknown.hbm_bytes_per_second == 8e9
    assert chip_of("TPU v5", 10, MEASURED).peak_flops == CHIPS["v5p"].peak_flops


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return compile_small({"fsdp": 8})


def test_a_step_on_cpu_devices_has_a_time_and_says_on_what_it_rests(step, tmp_path):
    step.save(tmp_path / "step")
    assert CompiledStep.load(tmp_path / "step").measured == step.measured
    plan = make_plan(step, parse_target("local"))
    assert 1e-4 < plan.roofline.step_seconds < 100
    assert "communication fsdp" in plan.roofline.bounds
    assert {one.axes for one in plan.roofline.exchanges} == {"fsdp"}
    assert any(one.tensor.startswith("params.stack.layers") for one in plan.roofline.exchanges)
    json.dumps(plan.to_dict())
    page = io.StringIO()
    show_plan(plan, Console(file=page, width=200))
    assert "rates measured on this machine: " in page.getvalue()


def test_half_the_rates_take_twice_the_time(step):
    given = dataclasses.replace(step, measured=MEASURED)
    halved = {name: rate / 2 for name, rate in MEASURED.items()}
    fast, slow = (
        make_plan(one, parse_target("local")).roofline
        for one in (given, dataclasses.replace(step, measured=halved))
    )
    assert slow.bounds["memory"] == pytest.approx(2 * fast.bounds["memory"])
    assert slow.step_seconds > 1.5 * fast.step_seconds


def test_without_rates_there_is_memory_and_no_time(step):
    plan = make_plan(dataclasses.replace(step, measured={}), parse_target("local"))
    assert plan.roofline is None
    assert plan.memory.peak > 0
