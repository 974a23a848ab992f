"""Model FLOPs per token, peak FLOP/s per device, and model FLOPs utilization (MFU).

Counted are the matrix multiplications the architecture needs, from shapes alone: not what XLA
executes, so rematerialization, padding and a fused kernel's extra work lower the MFU and never
raise it. Source: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), appendix B; docs/metrics.md has
the formula. A peak is per jax *device*, which is half a chip on TPU v2, v3 and TPU7x.
"""


def transformer_flops(
    *,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    gated: bool,
    vocab_size: int,
    sequence_length: int,
    causal_half: bool,
    attention_window: int | None = None,
) -> float:
    """Forward and backward FLOPs for one token of a decoder or encoder stack.

    With D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, L layers, T length:

        3 * (L * (2*D*H*(N + 2*K)              query, key and value projections
                  + 2*N*H*S + 2*N*H*S          scores, values
                  + 2*N*H*D                    output projection
                  + 2*D*F*(3 if gated else 2)) MLP
             + 2*D*V)                          head

    A multiply-add is 2 FLOPs, the backward pass costs twice the forward. S = T, as in PaLM, or
    S = T/2 with `causal_half`, which counts only the scores that a causal mask keeps. Where a query
    sees the last `attention_window` = W < T positions, S = W, or the mean over the queries,
    W - W*(W - 1)/(2*T), with `causal_half`. The embedding lookup, norms, softmax and activations
    are free. For a mixture of experts, `mlp_dim` is the width one token uses: experts per token
    times the width of an expert.

    Returns:
      FLOPs per token.

    Raises:
      ValueError: a size is below 1, or the kv heads do not divide the heads.
    """
    sizes = {
        "num_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": mlp_dim,
        "vocab_size": vocab_size,
        "sequence_length": sequence_length,
    }
    if attention_window is not None:
        sizes["attention_window"] = attention_window
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads = {num_kv_heads}: must divide num_heads = {num_heads}")
    seen = keys_seen(sequence_length, attention_window, causal_half)
    projections = 2 * embed_dim * head_dim * (2 * num_heads + 2 * num_kv_heads)
    attention = 4 * num_heads * head_dim * seen
    mlp = 2 * embed_dim * mlp_dim * (3 if gated else 2)
    head = 2 * embed_dim * vocab_size
    return float(3 * (num_layers * (projections + attention + mlp) + head))


def keys_seen(length: int, window: int | None, causal_half: bool) -> float:
    """Keys that a query of a sequence attends to, on average; with causal_half not those after it."""
    if window is None or window >= length:
        return length / 2 if causal_half else length
    return window - window * (window - 1) / (2 * length) if causal_half else window


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
      flops_per_token: forward and backward, as `transformer_flops` counts.
      num_devices: jax devices, `jax.device_count()`.

    Raises:
      ValueError: no device.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices = {num_devices}: must be at least 1")
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak)
