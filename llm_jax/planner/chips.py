"""The facts of accelerators that plans rest on, in one table, each with its source.

`CHIPS` has what a target can name: TPU generations and GPUs. `find_chip` gives the entry of a device at
hand, with the memory that the device itself reports; of a device that is not in the table the rates
are None, or measured (rates.py). Prices are list prices of a date and go stale: whoever plans with money gives their own.
"""

import contextlib
import dataclasses
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llm_jax.metrics.throughput import peak_flops

Kind = Literal["tpu", "gpu", "cpu"]

# Between the two devices of a chip: six times the bandwidth of a link between chips
# (docs.cloud.google.com/tpu/docs/tpu7x).
CORE_LINKS = 6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates and sizes are per chip, of which jax may see two devices.

    hbm_bytes: what a program can allocate; hbm_total_bytes: what is built in. Rates are None where
    they are not known. peak_flops: dense bfloat16; vector_flops: float32 outside the matrix units.
    clock_hz: turns the TPU compiler's cycles into seconds: peak over the FLOPs of one cycle (matrix
    arrays of mxu x mxu: 4 on v5e and v6e, 8 on v5p and tpu7x). dimensions: of the torus; links:
    neighbours of a chip, or 1 for the port to a switch. link_bytes_per_second: one direction of one
    link: the published bandwidth of a chip, which is of both directions, over its links over 2.
    network_bytes_per_second: one direction of a chip's share of the network between slices or hosts.
    host_bytes_per_second: one direction of the bus between a chip and its host's memory.
    largest: chips of the largest slice, or of a host. chip_config_name: libtpu's.
    dollars_per_chip_hour: on demand; price_note: whose price, and when.
    """

    name: str
    kind: Kind
    hbm_bytes: int
    hbm_total_bytes: int
    peak_flops: float | None = None
    hbm_bytes_per_second: float | None = None
    clock_hz: float | None = None
    mxu: int | None = None
    vector_flops: float | None = None
    devices: int = 1
    dimensions: int = 0
    links: int = 1
    link_bytes_per_second: float | None = None
    network_bytes_per_second: float | None = None
    host_bytes_per_second: float = 16e9
    largest: int = 1
    chip_config_name: str = ""
    dollars_per_chip_hour: float | None = None
    price_note: str = "no list price is known: give your own, in dollars per chip-hour"
    device_kinds: tuple[str, ...] = ()
    source: str = ""


_GIB = 2**30

# Additions and multiplications of a TPU's vector unit in a cycle, per TensorCore: 8 x 128 lanes with 4
# units each. Said of v5p; the lanes of the other generations are equally many
# (jax/_src/pallas/mosaic/tpu_info.py), and of their units nothing else is said.
# Source: jax-ml.github.io/scaling-book/tpus.
_VECTOR = 8 * 128 * 4

_GOOGLE = "Google Cloud's list price on demand in the US, {}"
_NO_GOOGLE = "Google Cloud lists no price that we know of: give your own, in dollars per chip-hour"

# Sources: docs.cloud.google.com/tpu/docs/{v5e, v5p, v6e, tpu7x} for memory, bandwidths, peak and the
# largest slice. What a program can allocate is what libtpu says when one does not fit
# ("exceeds available HBM (15.75G)"), which it says of each of the two devices of tpu7x.
# Bus to the host: 16 GB/s per TPU, 32 of v6e (jax-ml.github.io/scaling-book/tpus); of tpu7x nothing is
# published, so it has what most have.
# Prices: v5e and v5p as reported by several price lists in January 2026, v6e from the announcement of
# general availability, December 2024; none has been reported to have changed since.
_TPUS = (
    Chip(
        name="v5e", kind="tpu", hbm_bytes=int(15.75 * _GIB), hbm_total_bytes=16 * _GIB,
        peak_flops=197e12, hbm_bytes_per_second=0.819e12, clock_hz=1.5e9, mxu=128,
        vector_flops=_VECTOR * 1.5e9, dimensions=2, links=4, link_bytes_per_second=50e9,
        network_bytes_per_second=3.125e9, largest=256, chip_config_name="default",
        dollars_per_chip_hour=1.20, price_note=_GOOGLE.format("January 2026"),
        device_kinds=("TPU v5 lite", "TPU v5e"),
        source="docs.cloud.google.com/tpu/docs/v5e; network: 6.4 Tb/s of a pod over 256 chips",
    ),
    Chip(
        name="v5p", kind="tpu", hbm_bytes=int(95.73 * _GIB), hbm_total_bytes=96 * _GIB,
        peak_flops=459e12, hbm_bytes_per_second=2.765e12, clock_hz=1.75e9, mxu=128,
        vector_flops=2 * _VECTOR * 1.75e9, dimensions=3, links=6, link_bytes_per_second=100e9,
        network_bytes_per_second=6.25e9, largest=6144, chip_config_name="megacore",
        dollars_per_chip_hour=4.20, price_note=_GOOGLE.format("January 2026"),
        device_kinds=("TPU v5", "TPU v5p"),
        source="docs.cloud.google.com/tpu/docs/v5p",
    ),
    Chip(
        name="v6e", kind="tpu", hbm_bytes=int(31.24 * _GIB), hbm_total_bytes=32 * _GIB,
        peak_flops=918e12, hbm_bytes_per_second=1.638e12, clock_hz=1.75e9, mxu=256,
        vector_flops=_VECTOR * 1.75e9, dimensions=2, links=4, link_bytes_per_second=100e9,
        network_bytes_per_second=12.5e9, host_bytes_per_second=32e9, largest=256,
        chip_config_name="default", dollars_per_chip_hour=2.70,
        price_note=_GOOGLE.format("December 2024"), device_kinds=("TPU v6 lite", "TPU v6e"),
        source="docs.cloud.google.com/tpu/docs/v6e",
    ),
    Chip(
        name="tpu7x", kind="tpu", hbm_bytes=2 * int(94.74 * _GIB), hbm_total_bytes=192 * _GIB,
        peak_flops=2307e12, hbm_bytes_per_second=7.38e12, clock_hz=2.2e9, mxu=256, devices=2,
        vector_flops=2 * _VECTOR * 2.2e9, dimensions=3, links=6, link_bytes_per_second=100e9,
        network_bytes_per_second=12.5e9, largest=9216, chip_config_name="default",
        price_note=_NO_GOOGLE, device_kinds=("TPU7x",),
        source="docs.cloud.google.com/tpu/docs/tpu7x",
    ),
)  # fmt: skip


def _gpu(name: str, memory_mib: int, pcie: int = 4, **facts: Any) -> Chip:
    # jax takes three quarters of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    total = memory_mib * 2**20
    note = "prices of GPUs differ several times between providers: give your own, in dollars per GPU-hour"
    bus = 32e9 if pcie == 4 else 64e9  # 16 lanes
    return Chip(
        name, "gpu", total * 3 // 4, total, largest=8, price_note=note,
        host_bytes_per_second=bus, **facts,
    )  # fmt: skip


# Memory as nvidia-smi shows it; the rest from NVIDIA's data sheets, dense rates. link: to the NVLink
# switch, or PCIe 4.0 x16 where there is none. network: cards of a DGX host, else of a cloud's host.
_GPUS = (
    _gpu(
        "b200", 183_359, pcie=5, peak_flops=2250e12, hbm_bytes_per_second=8e12, vector_flops=75e12,
        link_bytes_per_second=900e9, network_bytes_per_second=50e9,
        device_kinds=("NVIDIA B200",), source="NVIDIA DGX B200 data sheet",
    ),
    _gpu(
        "h200", 143_771, pcie=5, peak_flops=989.4e12, hbm_bytes_per_second=4.8e12, vector_flops=67e12,
        link_bytes_per_second=450e9, network_bytes_per_second=50e9,
        device_kinds=("NVIDIA H200",), source="NVIDIA H200 SXM and DGX H200 data sheets",
    ),
    _gpu(
        "h100", 81_559, pcie=5, peak_flops=989.4e12, hbm_bytes_per_second=3.35e12, vector_flops=67e12,
        link_bytes_per_second=450e9, network_bytes_per_second=50e9,
        device_kinds=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 SXM and DGX H100 data sheets",
    ),
    _gpu(
        "a100", 81_920, peak_flops=312e12, hbm_bytes_per_second=2.039e12, vector_flops=19.5e12,
        link_bytes_per_second=300e9, network_bytes_per_second=25e9,
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        source="NVIDIA A100 80GB SXM and DGX A100 data sheets",
    ),
    _gpu(
        "a100_40gb", 40_960, peak_flops=312e12, hbm_bytes_per_second=1.555e12,
        vector_flops=19.5e12, link_bytes_per_second=300e9, network_bytes_per_second=25e9,
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        source="NVIDIA A100 40GB SXM and DGX A100 data sheets",
    ),
    _gpu(
        "l40s", 46_068, peak_flops=362e12, hbm_bytes_per_second=0.864e12, vector_flops=91.6e12,
        link_bytes_per_second=32e9, network_bytes_per_second=6.25e9,
        device_kinds=("NVIDIA L40S",), source="NVIDIA L40S data sheet; network of AWS g6e.48xlarge",
    ),
    _gpu(
        "l4", 23_034, peak_flops=121e12, hbm_bytes_per_second=0.3e12, vector_flops=30.3e12,
        link_bytes_per_second=32e9, network_bytes_per_second=1.56e9,
        device_kinds=("NVIDIA L4",), source="NVIDIA L4 data sheet; network of GCP g2-standard-96",
    ),
)  # fmt: skip

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in (*_TPUS, *_GPUS)}


def chip_of(
    device_kind: str, memory: int | None = None, measured: Mapping[str, float] | None = None
) -> Chip:
    """The chip of a kind of jax device; of one that is not in the table, its memory and its rates.

    Args:
      memory: bytes that a program can allocate on one device, where that is known.
      measured: rates.measure_rates of one, for a chip that is not in the table.
    """
    measured = measured or {}
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip if memory is None else _with_memory(chip, memory)
    kind: Kind = "cpu" if device_kind.lower() == "cpu" else "gpu"
    kind = "tpu" if device_kind.startswith("TPU") else kind
    moved = measured.get("bytes_per_second")
    return Chip(
        device_kind,
        kind,
        memory or 0,
        memory or 0,
        peak_flops=peak_flops(device_kind) or measured.get("peak_flops"),
        hbm_bytes_per_second=moved,
        # Devices of a CPU exchange through the memory that they share; links.py gives the devices
        # of a chip several links.
        link_bytes_per_second=moved / CORE_LINKS if moved and kind == "cpu" else None,
    )


def matmul_flops(chip: Chip, compute_dtype: str) -> float | None:
    """FLOP/s of matrix products of a dtype, at jax's default precision; None where it is not known.

    float32 goes through a TPU as bfloat16, and through a GPU as TF32, at half the rate
    (jax.lax.Precision; NVIDIA's data sheets). What was measured was measured in that dtype.
    """
    from_a_table = chip.name in CHIPS or peak_flops(chip.name) is not None
    is_tf32 = chip.kind == "gpu" and compute_dtype == "float32" and from_a_table
    return chip.peak_flops / 2 if is_tf32 else chip.peak_flops


def _with_memory(chip: Chip, memory: int) -> Chip:
    return dataclasses.replace(chip, hbm_bytes=chip.devices * memory)


def find_chip(device: Any) -> Chip:
    """The chip of a jax.Device at hand."""
    return chip_of(device.device_kind, device_memory(device))


def device_memory(device: Any) -> int | None:
    """Bytes that a program can allocate on a device; None of one that is not there.

    The devices of a CPU share the memory of the machine, or of the container that this runs in.
    """
    if device.platform == "cpu":
        return _host_memory() // max(1, len(device.client.local_devices()))
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a device that is only described has no memory to ask
        return None


def _host_memory() -> int:
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        least = min(least, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    address_space, _ = resource.getrlimit(
        resource.RLIMIT_AS
    )  # `ulimit -v`, as batch systems set it
    return least if address_space == resource.RLIM_INFINITY else min(least, address_space)
