"""Peak FLOP/s per device, and model FLOPs utilization (MFU; Chowdhery et al. 2022, PaLM, appendix B).

What a model needs is counted in core/flops.py. A peak is per jax *device*, which is half a chip on TPU
v2, v3 and TPU7x.
"""

# Dense bf16 FLOP/s (float32 accumulation, no 2:4 sparsity) by `jax.Device.device_kind`. TPU: Google
# Cloud's system architecture pages, divided where a chip shows up as two devices
# (jax/_src/pallas/mosaic/tpu_info.py). NVIDIA: the data sheets; fp16 on V100 and T4, which have no
# bf16 matrix units.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,  # 45 per chip of two devices
    "TPU v3": 61.5e12,  # 123 per chip of two devices
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # 2307 per chip of two devices
    "NVIDIA GB200": 2500e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla T4": 65e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one jax device, or None for a kind not in `PEAK_FLOPS` (a CPU, a MIG
    slice): the match is exact because "NVIDIA L4" is a prefix of "NVIDIA L40S".
    """
    return PEAK_FLOPS.get(device_kind)


def mfu(
    tokens_per_second: float, flops_per_token: float, num_devices: int, device_kind: str
) -> float | None:
    """Model FLOPs utilization, 0 to 1; None where the peak of the device is unknown.

    Args:
      tokens_per_second: over all devices.
      flops_per_token: forward and backward, as the model's `batch_flops` counts.
      num_devices: jax devices, `jax.device_count()`.

    Raises:
      ValueError: no device.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices = {num_devices}: must be at least 1")
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak)
