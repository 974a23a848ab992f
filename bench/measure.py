"""How benchmarks here measure: interleaved contenders, medians, the machine's own rate beside them."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over `rounds`, run in turns after one warm-up each.

    A contender that returns a float counts only those seconds.
    Turns, because a noisy machine is noisy for everyone in the same minute.
    """
    for run in contenders.values():
        run()
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            own = run()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_rate(dtype: str, size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product with float32 sums, on the first device."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    seconds = interleaved({"matmul": lambda: product(a).block_until_ready()}, rounds)["matmul"]
    return 2 * size**3 / seconds


def machine() -> dict[str, str | float]:
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_f32_gflops": matmul_rate("float32") / 1e9,
        "matmul_bf16_gflops": matmul_rate("bfloat16") / 1e9,
    }


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence], about: Mapping) -> None:
    """Prints a table and, under it, the machine."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*[f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row])
    console = Console(width=110)
    console.print(table)
    console.print(
        ", ".join(f"{k} {v:,.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items())
    )


def json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="also write the figures here")


def write_json(path: Path | None, content: Mapping) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
