"""A training step of GPT-1B on one GPU: speed, MFU, memory, and where the time goes.

    python -m bench.gpu                                       # batch sizes and rematerialization
    python -m bench.gpu --batch 8 --remat attention --kernel cudnn,blockwise,reference
    python -m bench.gpu --batch 8 --remat attention --profile /tmp/trace
    python -m bench.gpu --attention                           # the attention kernels alone
    python -m bench.gpu --tiny                                # a toy model, on any machine

The model has the sizes of configs/gpt_1b.py; rows of 2048 tokens are packed from documents of 512 on
average. Steps and large bfloat16 matrix products take turns, so the second MFU stands beside what the
same card did in the same minute. It needs jax, flax, optax and numpy, nothing that loads data: it runs
from the root of the repository where nothing can be installed. Each step measured has a process of its
own, since the allocator's peak cannot be reset.
"""

import argparse
import collections
import dataclasses
import functools
import json
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import attention, fresh, measure
from llm_jax.core.config import set_override
from llm_jax.core.flags import run_entry
from llm_jax.core.packing import next_token_batch
from llm_jax.metrics.throughput import peak_flops
from llm_jax.nn.kernels.spec import AttentionSpec, Kernel
from llm_jax.nn.remat import RematPolicy
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.xla_flags import apply
from llm_jax.training.config import RunConfig, resolve
from llm_jax.training.program import build_program
from llm_jax.training.speed import flops_per_token

MODEL = {
    "vocab_size": 32_768,
    "embed_dim": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "mlp_dim": 5632,
}
TINY = {"vocab_size": 320, "embed_dim": 64, "num_layers": 2, "num_heads": 2, "mlp_dim": 128}
MEAN_DOCUMENT = 512
STEPS_PER_ROUND = 3  # dispatched without waiting, as the training loop does
BOS, EOS = 0, 1


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to measure. matmul_size: of the matrix products that take turns with it."""

    batch: int
    remat: str
    kernel: str = "auto"
    length: int = 2048
    tiny: bool = False
    rounds: int = 5
    matmul_size: int = 8192
    overrides: tuple[str, ...] = ()
    profile: str | None = None


def run_of(job: Job) -> RunConfig:
    sizes = TINY if job.tiny else MODEL
    config = {
        "model": {"name": "gpt", "max_length": job.length, "remat": job.remat, **sizes},
        "data": {"sequence_length": job.length, "tokenizer": {"name": "raw_bytes"}},
        "optimizer": {"name": "adamw", "beta2": 0.95, "weight_decay": 0.1},
        "schedule": {"name": "constant"},
        "objective": {"name": "causal_lm", "z_loss": 1e-4},
        "train": {"num_steps": 10**6, "batch_size": job.batch, "attention_kernel": job.kernel},
    }
    for override in job.overrides:
        set_override(config, override)
    return resolve(config)


def packed_rows(batch: int, length: int, vocab_size: int) -> np.ndarray:
    """[batch, length + 1] int32: random documents, each after a BOS."""
    random = np.random.default_rng(0)
    rows = random.integers(2, vocab_size, (batch, length + 1)).astype(np.int32)
    rows[random.random(rows.shape) < 1 / MEAN_DOCUMENT] = BOS
    return rows


def matmuls(size: int, count: int = 8) -> tuple[Callable[[], None], float]:
    """Runs `count` dependent products of random bfloat16 matrices and waits; and their FLOPs.

    Random numbers: a card computes faster on constants, whose bits do not flip.
    """
    first, second = (jax.random.key(seed) for seed in (0, 1))
    x = jax.random.normal(first, (size, size), jnp.bfloat16)
    w = jax.random.normal(second, (size, size), jnp.bfloat16) * size**-0.5
    chain = jax.jit(lambda x, w: functools.reduce(lambda y, _: y @ w, range(count), x))
    return lambda: chain(x, w).block_until_ready(), count * 2.0 * size**3


def measure_step(job: Job) -> dict[str, Any]:
    """Compiles and times the step of a job on the first device."""
    run = run_of(job)
    program = build_program(run, make_mesh(MeshConfig(), jax.devices()[:1]))
    start = time.perf_counter()
    compiled = program.lower().compile()
    compile_s = time.perf_counter() - start
    rows = packed_rows(job.batch, job.length, run.model.vocab_size)
    batch = to_global_batch(next_token_batch(rows, BOS, EOS), program.rules, job.batch)
    state, metrics = compiled(program.init(jax.random.key(run.train.seed)), batch)
    first_loss = float(metrics["loss"])
    memory = jax.devices()[0].memory_stats() or {}

    def steps() -> None:
        nonlocal state, metrics
        for _ in range(STEPS_PER_ROUND):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    product, product_flops = matmuls(job.matmul_size)
    seconds = measure.interleaved({"steps": steps, "matmul": product}, job.rounds)
    if job.profile is not None:
        with jax.profiler.trace(job.profile):
            steps()
    return {
        "compile_s": compile_s,
        "step_s": seconds["steps"] / STEPS_PER_ROUND,
        "losses": [first_loss, float(metrics["loss"])],
        "peak_gb": memory.get("peak_bytes_in_use", 0) / 1e9 or None,
        "device": jax.devices()[0].device_kind,
        "parameters": program.num_params,
        **rates(run, seconds["steps"] / STEPS_PER_ROUND, product_flops / seconds["matmul"]),
    }


def rates(run: RunConfig, step_s: float, matmul_flops: float) -> dict[str, float | None]:
    """Per second, and as shares of the data sheet's peak and of the matmul rate.

    mfu counts whole attention, as PaLM does; mfu_causal_half only what a causal mask leaves.
    """
    tokens = run.train.batch_size * run.data.sequence_length / step_s
    whole, half = (tokens * flops_per_token(run, causal_half=causal) for causal in (False, True))
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "tokens_per_second": tokens,
        "model_tflops": whole / 1e12,
        "matmul_tflops": matmul_flops / 1e12,
        "mfu": whole / peak if peak else None,
        "mfu_causal_half": half / peak if peak else None,
        "mfu_of_matmul": whole / matmul_flops,
    }


def kernel_times(folder: Path) -> list[tuple[str, float, int]]:
    """(kernel, seconds, runs) of the newest trace in a folder, the longest first.

    Streams of the device only: the other lines of a trace tell of the same time again.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds, runs = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9
                    runs[event.name] += 1
    return [(name, s, runs[name]) for name, s in seconds.most_common()]


def show_profile(job: Job) -> None:
    times = kernel_times(Path(job.profile))
    whole = sum(s for _, s, _ in times)
    rows = [
        (name[:60], 1e3 * s / STEPS_PER_ROUND, f"{100 * s / whole:.1f}", count / STEPS_PER_ROUND)
        for name, s, count in times[:25]
    ]
    columns = ("kernel", "ms a step", "%", "runs a step")
    measure.show(
        f"kernels of {job.profile}", columns, rows, {"ms a step": 1e3 * whole / STEPS_PER_ROUND}
    )


def title_of(job: Job) -> str:
    return f"B {job.batch} {job.remat} {job.kernel}"


def show_steps(results: Sequence[tuple[Job, Mapping]]) -> None:
    columns = ("step", "ms", "tokens/s", "TFLOP/s", "MFU", "of matmul", "causal", "peak GB",
               "compile s")  # fmt: skip
    keys = ("tokens_per_second", "model_tflops", "mfu", "mfu_of_matmul", "mfu_causal_half",
            "peak_gb", "compile_s")  # fmt: skip
    rows, about = [], {"jax": jax.__version__}
    for job, result in results:
        name = title_of(job)
        if "error" in result:
            rows.append((f"{name}: {result['error'][:70]}", *[""] * 8))
            continue
        values = ("" if result[key] is None else result[key] for key in keys)
        rows.append((name, 1e3 * result["step_s"], *values))
        about |= {"device": result["device"], "matmul TFLOP/s": result["matmul_tflops"]}
    measure.show("training step on one device", columns, rows, about)


def compare_attention(lengths: Sequence[int], tokens: int, rounds: int, tiny: bool) -> dict:
    """Forward and backward of one layer's attention, bfloat16, packed; by length and kernel."""
    model = TINY if tiny else MODEL
    heads = model["num_heads"]
    rows, seconds = [], []
    for length in lengths:
        documents = max(1, length // MEAN_DOCUMENT)
        sizes = attention.Sizes(tokens, heads, heads, model["embed_dim"] // heads, documents)
        here = attention.contenders(sizes, AttentionSpec(), length, "bfloat16", [])
        for kernel, s in measure.interleaved(here, rounds).items():
            rate = attention.flops(sizes, length) / s / 1e12
            rows.append((f"T {length}", kernel, 1e3 * s, rate))
            seconds.append({"length": length, "kernel": kernel, "seconds": s, "tflops": rate})
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    measure.show(f"attention, {sizes}", ("rows", "kernel", "ms", "TFLOP/s"), rows, about)
    return {"sizes": dataclasses.asdict(sizes), "machine": about, "seconds": seconds}


def jobs_of(flags: argparse.Namespace) -> Iterator[Job]:
    for remat in flags.remat.split(","):
        for kernel in flags.kernel.split(","):
            for batch in flags.batch.split(","):
                folder = flags.profile and str(flags.profile / f"{batch}_{remat}_{kernel}")
                yield Job(
                    batch=int(batch),
                    remat=remat,
                    kernel=kernel,
                    length=flags.length,
                    tiny=flags.tiny,
                    rounds=flags.rounds,
                    matmul_size=256 if flags.tiny else Job.matmul_size,
                    overrides=tuple(flags.set),
                    profile=folder,
                )


def sweep(flags: argparse.Namespace) -> dict:
    results = []
    for job in jobs_of(flags):
        # A benchmark may take nearly all of the memory; the default leaves a quarter.
        result = fresh.run("bench.gpu", job, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"})
        print(f"{title_of(job)}: {result.get('error', 'done')}", file=sys.stderr)
        results.append((job, result))
    show_steps(results)
    for job, result in results:
        if job.profile is not None and "error" not in result:
            show_profile(job)
    return {"steps": [{**dataclasses.asdict(job), **result} for job, result in results]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="8,16", help="rows of a step; several with commas")
    parser.add_argument("--remat", default="attention,dots",
                        help=f"of {', '.join(typing.get_args(RematPolicy))}")  # fmt: skip
    parser.add_argument("--kernel", default="auto", help=f"of {', '.join(typing.get_args(Kernel))}")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override a key of the config")  # fmt: skip
    parser.add_argument("--profile", type=Path, help="trace the steps into this folder")
    parser.add_argument("--attention", action="store_true", help="the attention kernels alone")
    parser.add_argument("--tiny", action="store_true", help="a toy model, on any machine")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    measure.json_flag(parser)
    flags = parser.parse_args()
    apply()
    if flags.one is not None:
        print(json.dumps(measure_step(Job(**json.loads(flags.one)))))
        return
    if flags.attention:
        lengths, tokens = ((64, 128), 256) if flags.tiny else ((2048, 4096, 8192), 16_384)
        result = compare_attention(lengths, tokens, flags.rounds, flags.tiny)
    else:
        result = sweep(flags)
    measure.write_json(flags.json, result)


if __name__ == "__main__":
    run_entry(main)
