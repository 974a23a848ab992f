"""What our training step becomes on TPU slices that are not there, beside MaxText's.

    python -m bench.scaling                                    # four slices, full rematerialization
    python -m bench.scaling --chips v5p-16,v5p-128 --remat minimal
    python -m bench.scaling --flat                             # chips and batch grow together
    python -m bench.scaling --max --chips v5p-16               # the most sequences a chip can hold
    python -m bench.scaling --set model.attention_kernel=splash --option xla_tpu_enable_x=true

libtpu compiles on any machine, so nothing runs: the figures are the compiler's. The model is a decoder
of 1.3 B parameters: 24 layers, embed 2048, 16 heads of 128, gated MLP of 5632, 32,000 tokens, tied,
T 2048, 4 sequences per chip, bfloat16 over float32, AdamW, parameters in shares over all chips.
"Cycles" are the compiler's estimates times the trips of the loops; collectives and Pallas kernels have
none and are not in them. A collective's bytes are those of the whole array it is about. Each
compilation has a process of its own, so that memory and flags are fresh.
"""

import argparse
import dataclasses
import json
import sys
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bench import fresh, measure
from llm_jax.core.config import set_override
from llm_jax.core.flags import run_entry
from llm_jax.nn.remat import RematPolicy
from llm_jax.planner.hlo import HloSummary, Total, analyse
from llm_jax.planner.topology import (
    Topology,
    libtpu_version,
    make_mesh,
    parse_name,
    topology,
)
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program

LENGTH, SEQUENCES_PER_CHIP, EMBED_DIM = 2048, 4, 2048
LARGEST_FSDP = EMBED_DIM // 2  # more chips hold copies: a share is then two columns of a matrix
DEFAULT = "v5p-16,v5p-128,v6e-16,v6e-256"
FLAT_CHIPS = ("v5p-16", "v5p-64", "v5p-256", "v5p-1024", "v5p-4096")
# The compiler cuts a matmul with gathered operand into a ring of smaller ones ("windowed einsum").
# Its cycle estimates then count the ring's steps as if nothing overlapped.
NOT_WINDOWED = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class Published:
    """MaxText's step of the same model; GB per chip, milliseconds at 1.75 GHz, seconds."""

    compile: float | None = None
    arguments: float | None = None
    temp: float | None = None
    peak: float | None = None
    cycles_ms: float | None = None
    note: str = ""


# Compiled by MaxText's train_compile in the middle of 2026 with jax 0.12.0.1 and libtpu 0.0.52.
MAXTEXT: Mapping[tuple[str, str], Published] = {
    ("v5p-16", "full"): Published(27, 0.975, 2.265, 3.231, 261, "717 ms and 11,913 permutes windowed"),
    ("v5p-128", "full"): Published(
        31, 0.123, 2.063, 2.165, 269, "338 all-gathers 5.07 GB, 28 all-reduces 2.6 GB, 2 all-to-alls"
    ),
    ("v6e-16", "full"): Published(42, 0.975, 2.230, 3.182, 191, "659 ms windowed"),
    ("v6e-256", "full"): Published(57, 0.062, 1.907, 1.921, 186),
    ("v5p-16", "minimal"): Published(25, peak=10.88, cycles_ms=833, note="windowed"),
    ("v5p-128", "minimal"): Published(30, peak=9.82, cycles_ms=241),
    ("v6e-16", "minimal"): Published(37, peak=10.83, cycles_ms=753, note="windowed"),
    ("v6e-256", "minimal"): Published(36, peak=9.56, cycles_ms=206),
}  # fmt: skip
# MaxText's "minimal" keeps the results of the weight matmuls, which we call "dots".
REMAT_NAMES = {"minimal": "dots"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One compilation. chips: a name for planner.topology; overrides: `section.key=value`."""

    chips: str
    remat: str = "full"
    sequences_per_chip: int = SEQUENCES_PER_CHIP
    overrides: tuple[str, ...] = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hlo: str | None = None


def config_of(job: Job, slices: Topology) -> dict[str, Any]:
    fsdp = min(len(slices.devices) // slices.num_slices, LARGEST_FSDP)
    config = {
        "model": {
            "name": "gpt", "vocab_size": 32_000, "embed_dim": EMBED_DIM, "num_layers": 24,
            "num_heads": 16, "mlp_dim": 5632, "max_length": LENGTH, "tie_embeddings": True,
            "remat": REMAT_NAMES.get(job.remat, job.remat),
        },
        "data": {"sequence_length": LENGTH, "tokenizer": {"name": "raw_bytes"}},
        "optimizer": {"name": "adamw"},
        "mesh": {"data": -1, "fsdp": fsdp},
        "train": {"num_steps": 1000, "batch_size": job.sequences_per_chip * slices.num_chips},
    }  # fmt: skip
    for override in job.overrides:
        set_override(config, override)
    return config


def compile_one(job: Job) -> dict[str, Any]:
    """Lowers and compiles the training step; its figures, per chip where they are per device."""
    slices = topology(job.chips)
    run = resolve(config_of(job, slices))
    program = build_program(run, make_mesh(run.mesh, slices))
    start = time.perf_counter()
    lowered = program.lower()
    middle, busy = time.perf_counter(), time.process_time()
    compiled = lowered.compile(compiler_options=dict(job.options))
    seconds, busy = time.perf_counter() - middle, time.process_time() - busy
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if job.hlo is not None:
        Path(job.hlo).write_text(text)
    gigabytes = lambda size: slices.chip.devices * size / 1e9  # noqa: E731
    return {
        "parameters": program.num_params,
        "lower_s": middle - start,
        "compile_s": seconds,
        "compile_cpu_s": busy,
        "arguments_gb": gigabytes(memory.argument_size_in_bytes),
        "temp_gb": gigabytes(memory.temp_size_in_bytes),
        "peak_gb": gigabytes(memory.peak_memory_in_bytes),
        "hbm_gb": slices.chip.hbm_bytes / 1e9,
        **figures(analyse(text), slices.chip.clock_hz),
    }


def figures(summary: HloSummary, clock_hz: float) -> dict[str, Any]:
    """What the HLO says, in plain values."""
    as_dicts = lambda totals: {k: dataclasses.asdict(t) for k, t in totals.items()}  # noqa: E731
    layers = {}
    for direction in ("forward", "backward"):
        loop = summary.layers(direction)
        if loop is not None:
            layers[direction] = {
                "times": loop.times,
                "cycles_ms": 1e3 * loop.cycles / clock_hz,
                "collectives": as_dicts(summary.loop_totals(loop)),
            }
    return {
        "cycles_ms": 1e3 * summary.cycles / clock_hz,
        "collectives": as_dicts(summary.totals()),
        "layers": layers,
        "untimed": dict(summary.untimed),
        "largest_buffers": [
            f"{b.dtype}{list(b.shape)} {b.bytes / 1e9:.3f} GB {b.op_name}"
            for b in summary.largest_buffers(8)
        ],
    }


def in_subprocess(job: Job) -> dict[str, Any]:
    # A TPU of this machine stays free.
    return fresh.run("bench.scaling", job, {"JAX_PLATFORMS": "cpu"})


def grow(job: Job) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Doubles the sequences per chip for as long as the step fits."""
    while True:
        result = in_subprocess(job)
        yield job, result
        if "error" in result or result["peak_gb"] > result["hbm_gb"]:
            return
        job = dataclasses.replace(job, sequences_per_chip=2 * job.sequences_per_chip)


def title_of(job: Job) -> str:
    more = "" if job.sequences_per_chip == SEQUENCES_PER_CHIP else f" B {job.sequences_per_chip}"
    return f"{job.chips} {job.remat}{more}"


def show_steps(results: Sequence[tuple[Job, dict]], about: Mapping) -> None:
    columns = ("step", "compile s", "CPU s", "arguments GB", "temp GB", "peak GB", "cycles ms", "")
    keys = ("compile_s", "compile_cpu_s", "arguments_gb", "temp_gb", "peak_gb", "cycles_ms")
    rows = []
    for job, result in results:
        if "error" in result:
            rows.append((f"{title_of(job)}: {result['error'][:90]}", *[""] * 7))
            continue
        kernels = {k: n for k, n in result["untimed"].items() if k not in result["collectives"]}
        note = ", ".join(f"{n} {kernel}" for kernel, n in kernels.items())
        rows.append((title_of(job), *[number(result[key]) for key in keys], note))
        theirs = MAXTEXT.get((job.chips, job.remat))
        if theirs is not None and job.sequences_per_chip == SEQUENCES_PER_CHIP:
            values = (theirs.compile, None, theirs.arguments, theirs.temp, theirs.peak,
                      theirs.cycles_ms)  # fmt: skip
            rows.append(("  MaxText", *[number(value) for value in values], theirs.note))
    measure.show("training step, per chip", columns, rows, about)


def show_collectives(results: Sequence[tuple[Job, dict]], about: Mapping) -> None:
    columns = ("step", "collective", "runs", "overlapped", "GB", "sent GB", "a layer forward",
               "a layer backward")  # fmt: skip
    rows = []
    for job, result in results:
        for kind, total in result.get("collectives", {}).items():
            layers = [
                layer_text(result["layers"].get(direction, {}).get("collectives", {}).get(kind))
                for direction in ("forward", "backward")
            ]
            sizes = [number(total[key] / 1e9) for key in ("bytes", "sent_bytes")]
            counts = (total["count"], total["overlapped"])
            rows.append((title_of(job), kind, *counts, *sizes, *layers))
    measure.show("collectives of one step", columns, rows, about)


def layer_text(total: Mapping | None) -> str:
    return "" if total is None else f"{total['count']}, {Total(**total).bytes / 1e6:,.1f} MB"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def jobs_of(flags: argparse.Namespace) -> list[Job]:
    options = {} if flags.windowed else dict(NOT_WINDOWED)
    options |= dict(option.split("=", 1) for option in flags.option)
    names = (
        FLAT_CHIPS if flags.flat and flags.chips is None else (flags.chips or DEFAULT).split(",")
    )
    jobs = []
    for remat in flags.remat.split(","):
        for name in names:
            parse_name(name.partition("/")[0])
            file = None
            if flags.hlo is not None:
                flags.hlo.mkdir(parents=True, exist_ok=True)
                file = str(flags.hlo / f"{name.replace('/', '_')}_{remat}.hlo")
            jobs.append(Job(name, remat, flags.batch, tuple(flags.set), options, file))
    return jobs


def main() -> None:
    policies = ", ".join((*typing.get_args(RematPolicy), *REMAT_NAMES))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", help=f"slices, {DEFAULT}; see llm_jax/planner/topology.py")
    parser.add_argument("--remat", default="full", help=f"of {policies}; several with commas")
    parser.add_argument("--batch", type=int, default=SEQUENCES_PER_CHIP, help="sequences per chip")
    parser.add_argument("--flat", action="store_true", help="16 to 4,096 chips: peak per chip")
    parser.add_argument("--max", action="store_true", help="double --batch for as long as it fits")
    parser.add_argument("--windowed", action="store_true", help="leave windowed einsum on")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="override a key of the config")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="a compiler option")  # fmt: skip
    parser.add_argument("--hlo", type=Path, help="keep the compiled texts in this folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    measure.json_flag(parser)
    flags = parser.parse_args()
    if flags.one is not None:
        print(json.dumps(compile_one(Job(**json.loads(flags.one)))))
        return
    about = {"jax": jax.__version__, "libtpu": libtpu_version()}
    results = []
    for job in jobs_of(flags):
        for one in grow(job) if flags.max else [(job, in_subprocess(job))]:
            print(f"{title_of(one[0])}: {one[1].get('error', 'compiled')}", file=sys.stderr)
            results.append(one)
    show_steps(results, about)
    show_collectives(results, about)
    content = [{**dataclasses.asdict(job), **result} for job, result in results]
    measure.write_json(flags.json, {"machine": about, "steps": content})


if __name__ == "__main__":
    run_entry(main)
