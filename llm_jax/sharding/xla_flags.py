"""XLA's own switches for each backend, in one place, each with its reason and its source.

They are set before jax starts its backends, in the variables that XLA reads: LIBTPU_INIT_ARGS for a
TPU, XLA_FLAGS for a GPU. What the user has set there wins, flag by flag; LLM_JAX_XLA_FLAGS=off leaves
both variables alone. On the way a machine without a TPU is told not to look for one. XLA aborts a
process that gives it a flag it does not know, so the tests hand every flag to the compilers that are
installed.

The table is short on purpose. Most flags that circulate are the default by now or do nothing for
this program; docs/xla_flags.md says which were tried and left out.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Literal

import jax
from jax._src import xla_bridge

Platform = Literal["tpu", "gpu", "cpu"]

_XLA_GUIDE = "openxla.org/xla/flags_guidance"
_MAXTEXT = "AI-Hypercomputer/maxtext: benchmarks/xla_flags_library.py"
_NVIDIA = "docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"
_MEASURED = "docs/benchmarks.md, Pods"


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    value: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


FLAGS: dict[Platform, tuple[Flag, ...]] = {
    "tpu": (
        Flag(
            "xla_tpu_enable_data_parallel_all_reduce_opt",
            "true",
            "gradients summed between slices over the data-center network, while steps compute",
            _MAXTEXT,
        ),
        Flag(
            "xla_tpu_data_parallel_opt_different_sized_ops",
            "true",
            "the same for all-reduces of different sizes, over several iterations of a loop",
            _MAXTEXT,
        ),
        Flag(
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
            "true",
            "all-reduces run beside computation on v5e and v6e, as all-gathers do by default",
            _XLA_GUIDE,
        ),
        Flag(
            "xla_tpu_enable_async_all_to_all",
            "true",
            "tokens on their way to experts travel beside computation",
            _XLA_GUIDE,
        ),
        Flag(
            "xla_jf_spmd_threshold_for_windowed_einsum_mib",
            "1000000",
            "weights are gathered whole: gathering them in pieces between pieces of the product takes "
            "more than twice the time on 16 chips",
            _MEASURED,
        ),
    ),
    "gpu": (
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "collectives start early and end late, with computation between; off by default",
            _NVIDIA,
        ),
        Flag(
            "xla_gpu_enable_pipelined_all_gather",
            "true",
            "the next layer's parameters are gathered during this layer; off by default",
            _NVIDIA,
        ),
        Flag(
            "xla_gpu_enable_pipelined_all_reduce",
            "true",
            "a layer's gradients are summed during the layer before it; off by default",
            _NVIDIA,
        ),
    ),
    "cpu": (),
}

# More of a chip's own memory for the windows of one fusion than libtpu's default (16 MiB, 32 on v6e), by
# jax's device kind: by the compiler's figures steps take 4 to 16 % less time, and two to four times as
# long to compile (docs/xla_flags.md). TPU7x gains nothing. Pallas kernels set their own.
_SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
SCOPED_VMEM_KIB: dict[str, int] = {
    "TPU v5 lite": 50_000,
    "TPU v5e": 50_000,
    "TPU v5": 50_000,
    "TPU v5p": 50_000,
    "TPU v6 lite": 65_536,
    "TPU v6e": 65_536,
}

# libtpu's own, by a device kind of each generation: what a search compiles with.
DEFAULT_VMEM_KIB: dict[str, int] = {"TPU v5e": 16_384, "TPU v5p": 16_384, "TPU v6e": 32_768}

VARIABLES: dict[Platform, str] = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS", "cpu": "XLA_FLAGS"}

# The names jax.config's `jax_platforms` takes, and what each is here.
_PLATFORM_NAMES: dict[str, Platform] = {
    "tpu": "tpu",
    "cuda": "gpu",
    "rocm": "gpu",
    "gpu": "gpu",
    "cpu": "cpu",
}


def xla_flags(platform: Platform) -> tuple[str, ...]:
    """The flags of a platform, as `--name=value`."""
    return tuple(str(flag) for flag in _of(platform))


def compiler_options(platform: Platform) -> dict[str, str]:
    """The same flags as `compiler_options` of one `jax.stages.Lowered.compile`."""
    return {flag.name: flag.value for flag in _of(platform)}


def device_options(device_kind: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Options of one compilation that depend on the generation of the chip.

    They are not in the variable, which is set before anyone knows the chip. What the user has set
    there wins, and so does LLM_JAX_XLA_FLAGS=off.
    """
    kib = SCOPED_VMEM_KIB.get(device_kind)
    off = environment.get("LLM_JAX_XLA_FLAGS") == "off"
    if kib is None or off or _SCOPED_VMEM in environment.get(VARIABLES["tpu"], ""):
        return {}
    return {_SCOPED_VMEM: str(kib)}


def quick_options(device_kinds: Iterable[str]) -> dict[str, str]:
    """Options instead of `device_options` that compile in a half to a fifth of the time.

    Args:
      device_kinds: names of one generation.
    """
    found = [DEFAULT_VMEM_KIB[kind] for kind in device_kinds if kind in DEFAULT_VMEM_KIB]
    return {_SCOPED_VMEM: str(found[0])} if found else {}


def apply(
    platform: Platform | None = None,
    environment: MutableMapping[str, str] = os.environ,
    devices: Path = Path("/dev"),
) -> tuple[str, ...]:
    """Adds the platform's flags to the variable that its compiler reads; call it before jax starts.

    Where libtpu is installed and there is no TPU, a guess also sets JAX_PLATFORMS, unless it is set:
    jax would start libtpu, which looks for chips and prints errors about what it does not find.

    Args:
      platform: None to guess it, without starting jax.

    Returns:
      The flags that were added: all that the variable does not name yet.

    Raises:
      ValueError: no such platform, or LLM_JAX_XLA_FLAGS is neither "on" nor "off".
    """
    switch = environment.get("LLM_JAX_XLA_FLAGS", "on")
    if switch not in ("on", "off"):
        raise ValueError(f"LLM_JAX_XLA_FLAGS={switch}: expected on or off")
    if platform is None:
        platform = guess_platform(environment, devices)
        if platform != "tpu" and "JAX_PLATFORMS" not in environment and _installed("libtpu"):
            _name_platforms(platform, environment, devices)
    if switch == "off":
        return ()
    mine, variable = _of(platform), VARIABLES[platform]
    given = environment.get(variable, "").split()
    named = {flag.lstrip("-").partition("=")[0] for flag in given}
    added = tuple(str(flag) for flag in mine if flag.name not in named)
    if added:
        environment[variable] = " ".join([*given, *added])
    return added


def guess_platform(
    environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> Platform:
    """What jax is going to run on: JAX_PLATFORMS, else the devices with an installed plugin."""
    first = environment.get("JAX_PLATFORMS", "").partition(",")[0].strip().lower()
    if first:
        return _PLATFORM_NAMES.get(first, "cpu")
    if _has(devices, "accel[0-9]*", "vfio/[0-9]*") and _installed("libtpu"):
        return "tpu"
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
    if _has(devices, "nvidia[0-9]*", "kfd") and _installed(*plugins):
        return "gpu"
    return "cpu"


def _name_platforms(
    platform: Platform, environment: MutableMapping[str, str], devices: Path
) -> None:
    gpu = "cuda" if _has(devices, "nvidia[0-9]*") else "rocm"
    names = f"{gpu},cpu" if platform == "gpu" else "cpu"
    if environment is os.environ:
        if jax.config.jax_platforms or xla_bridge.backends_are_initialized():
            return
        # jax has read the variable when it was imported.
        jax.config.update("jax_platforms", names)
    environment["JAX_PLATFORMS"] = names


def _of(platform: Platform) -> tuple[Flag, ...]:
    if platform not in FLAGS:
        raise ValueError(f"platform {platform!r} is unknown; choices: {', '.join(FLAGS)}")
    return FLAGS[platform]


def _has(devices: Path, *patterns: str) -> bool:
    return any(next(devices.glob(pattern), None) is not None for pattern in patterns)


def _installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is not None for module in modules)
