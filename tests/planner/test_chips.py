"""The table of chips agrees with itself, with the metrics' peaks and with the device at hand."""

import dataclasses
import re
import resource
from pathlib import Path

import jax
import pytest

from llm_jax.metrics.throughput import PEAK_FLOPS
from llm_jax.planner.chips import CHIPS, chip_of, device_memory, find_chip, matmul_flops

TPUS = [chip for chip in CHIPS.values() if chip.kind == "tpu"]
# Matrix arrays of mxu x mxu that make the peak.
ARRAYS = {"v5e": 4, "v5p": 8, "v6e": 4, "tpu7x": 8}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_facts_are_plausible_and_sourced(chip):
    assert chip.source
    assert 0.7 * chip.hbm_total_bytes < chip.hbm_bytes < chip.hbm_total_bytes
    # Who mixes up bits and bytes, or a chip and its links, falls out of this order.
    order = (
        chip.peak_flops, chip.vector_flops, chip.hbm_bytes_per_second,
        chip.links * chip.link_bytes_per_second, chip.network_bytes_per_second,
    )  # fmt: skip
    assert list(order) == sorted(order, reverse=True)
    for kind in chip.device_kinds:
        assert chip.peak_flops / chip.devices == PEAK_FLOPS[kind], kind
        assert chip_of(kind) == chip


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_tpus(chip):
    per_cycle = ARRAYS[chip.name] * 2 * chip.mxu**2
    assert chip.peak_flops == pytest.approx(per_cycle * chip.clock_hz, rel=0.01)
    assert chip.links == 2 * chip.dimensions


@pytest.mark.parametrize(
    ("name", "gib", "bytes_per_second", "links_gbps", "network_gbps", "largest", "dollars"),
    [
        ("v5e", 16, 0.819e12, 1600, 25, 256, 1.20),
        ("v5p", 96, 2.765e12, 4800, 50, 6144, 4.20),
        ("v6e", 32, 1.638e12, 3200, 100, 256, 2.70),
        ("tpu7x", 192, 7.38e12, 4800, 100, 9216, None),
    ],
)
def test_tpus_are_as_published(
    name, gib, bytes_per_second, links_gbps, network_gbps, largest, dollars
):
    """As Google Cloud's pages have them: links in Gbit/s of a chip, one direction."""
    chip = CHIPS[name]
    assert chip.hbm_total_bytes == gib * 2**30
    assert chip.hbm_bytes_per_second == bytes_per_second
    assert chip.links * chip.link_bytes_per_second * 8 == links_gbps * 1e9
    assert chip.network_bytes_per_second * 8 == network_gbps * 1e9
    assert (chip.largest, chip.dollars_per_chip_hour) == (largest, dollars)


def test_float32_takes_twice_the_time_on_gpus_only():
    for name in ("h100", "l4"):
        assert matmul_flops(CHIPS[name], "float32") == CHIPS[name].peak_flops / 2
        assert matmul_flops(CHIPS[name], "bfloat16") == CHIPS[name].peak_flops
    assert matmul_flops(CHIPS["v5p"], "float32") == CHIPS["v5p"].peak_flops
    measured = chip_of("Quark", 7, {"peak_flops": 1e12})
    assert matmul_flops(measured, "float32") == 1e12, "that was measured in float32"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_a_price_says_whose_and_when_and_a_missing_one_asks_for_yours(chip):
    if chip.dollars_per_chip_hour is None:
        assert "give your own" in chip.price_note
    else:
        assert "list price" in chip.price_note
        assert "202" in chip.price_note


def test_the_cpu_at_hand_shares_its_memory_among_its_devices():
    device = jax.devices()[0]
    chip = find_chip(device)
    assert (chip.kind, chip.peak_flops, chip.hbm_bytes_per_second) == ("cpu", None, None)
    assert chip.hbm_bytes == device_memory(device) > 2**26
    whole = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert chip.hbm_bytes * jax.local_device_count() <= 1024 * int(whole[1])


def test_a_limit_of_virtual_memory_counts(monkeypatch):
    devices = jax.local_device_count()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (devices * 2**20, resource.RLIM_INFINITY))
    assert device_memory(jax.devices()[0]) == 2**20


def test_what_a_device_says_of_its_memory_wins():
    chip = chip_of("TPU7x", memory=50)
    assert chip.hbm_bytes == 100, "two devices"
    assert dataclasses.replace(chip, hbm_bytes=CHIPS["tpu7x"].hbm_bytes) == CHIPS["tpu7x"]


@pytest.mark.parametrize(
    ("device_kind", "kind", "peak"),
    [
        ("TPU v4", "tpu", 275e12),
        ("NVIDIA GeForce RTX 4090", "gpu", 165.2e12),
        ("Quark", "gpu", None),
    ],
)
def test_chips_outside_the_table(device_kind, kind, peak):
    chip = chip_of(device_kind, memory=7)
    assert (chip.kind, chip.peak_flops, chip.hbm_bytes) == (kind, peak, 7)
    assert chip.link_bytes_per_second is None
