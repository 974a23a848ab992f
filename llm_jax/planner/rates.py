"""How fast the devices at hand are, for those that no table knows: CPUs, and GPUs that chips.py lacks.

Two things are timed: a matrix product as training makes them, and a pass over an array that no cache
holds. It takes less than a second, and two hundred megabytes. Devices of a CPU share its cores and
its memory, so each has its part of what one of them reaches alone.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = 5


def measure_rates(device: Any, compute_dtype: str) -> Mapping[str, float]:
    """Of one of this process's devices, while nothing else runs on them.

    Args:
      compute_dtype: of the operands; sums are float32.

    Returns:
      "peak_flops" and "bytes_per_second", read and written together; {} where memory is too short.
    """
    on_cpu = device.platform == "cpu"
    # Sizes and runs that take about 10 ms each: shorter ones would time their own start.
    size, elements, runs = (1024, 2**24, 1) if on_cpu else (8192, 2**27, 4)
    shared_by = len(device.client.local_devices()) if on_cpu else 1
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    try:
        with jax.default_device(device):
            matrix = jnp.ones((size, size), compute_dtype)
            seconds = _seconds(lambda x: product(x, x), matrix, runs)
            flops = 2 * size**3 / seconds
            vector = jnp.ones(elements, jnp.float32)
            moved = 2 * vector.nbytes / _seconds(lambda x: x + 1, vector, runs)
    except jax.errors.JaxRuntimeError:
        return {}
    return {"peak_flops": flops / shared_by, "bytes_per_second": moved / shared_by}


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, runs: int) -> float:
    """Of one run: the median of ROUNDS rounds of `runs`, after one that compiles."""
    compiled = jax.jit(function).lower(x).compile()
    compiled(x).block_until_ready()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(runs):
            result = compiled(x)
        result.block_until_ready()
        times.append((time.perf_counter() - start) / runs)
    return statistics.median(times)
