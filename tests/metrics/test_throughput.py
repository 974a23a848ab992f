"""Peaks of devices, and MFU."""

import pytest

from llm_jax.metrics.throughput import PEAK_FLOPS, mfu, peak_flops


def test_peaks():
    assert peak_flops("TPU v5 lite") == 197e12
    assert 2 * peak_flops("TPU7x") == 2307e12  # a chip is two jax devices
    assert peak_flops("NVIDIA L40S") != peak_flops("NVIDIA L4")
    assert peak_flops("cpu") is None
    assert all(1e13 < peak < 1e16 for peak in PEAK_FLOPS.values())


def test_mfu():
    tokens_per_second = 4 * 275e12 / 1e9
    assert mfu(tokens_per_second, 1e9, 4, "TPU v4") == pytest.approx(1.0)
    assert mfu(tokens_per_second, 1e9, 8, "TPU v4") == pytest.approx(0.5)
    assert mfu(1e3, 1e9, 1, "NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    with pytest.raises(ValueError, match="num_devices = 0"):
        mfu(1.0, 1.0, 0, "TPU v4")
