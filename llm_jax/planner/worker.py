"""Lowers and compiles one training step: `python -m llm_jax.planner.worker FOLDER`.

The process of compile.py. FOLDER/request.json says what to compile; FOLDER/answer.json says what came
of it, and FOLDER/step holds it unless the cache did. It dies with its parent, which holds the other end
of its standard input.

`compile_here` does the same where a program is at hand: for a run that ended out of memory, or one
that is about to start.
"""

import hashlib
import json
import os
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.core import flops
from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.flags import RunError, first_line
from llm_jax.planner import chips, compiled, layout, rates, topology
from llm_jax.planner.chips import device_memory, find_chip
from llm_jax.planner.compile import ANSWER, REQUEST, STEP, Request, versions
from llm_jax.planner.compiled import CompiledStep, MemoryAnalysis, OutOfMemory
from llm_jax.planner.layout import arguments_of, mesh_axes
from llm_jax.sharding import xla_flags
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import RunConfig, resolve
from llm_jax.training.program import Program, build_program
from llm_jax.training.speed import flops_per_token


def main() -> None:
    folder = Path(sys.argv[1])
    threading.Thread(target=_die_with_parent, daemon=True).start()
    content = json.loads((folder / REQUEST).read_text())
    cache = content.pop("cache")
    try:
        answer = _answer(Request(**content), folder, None if cache is None else Path(cache))
    except (RunError, ValueError) as error:
        if not isinstance(error, ConfigError | RunError) and not _raised_here(error):
            raise
        kind = "run" if isinstance(error, RunError) else "config"
        answer = {"kind": kind, "message": first_line(error)}
    (folder / ANSWER).write_text(json.dumps(answer))


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _raised_here(error: Exception) -> bool:
    package = str(Path(__file__).resolve().parents[1])
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(package)


def _answer(request: Request, folder: Path, cache: Path | None) -> dict[str, Any]:
    """The key of the step in the cache; {"kind": "step"} says that it is there or in the folder.

    With "measured", where the step in the cache may have been timed on another day.
    """
    run = resolve(request.config)
    if request.target == "local":
        xla_flags.apply()
        mesh = make_mesh(run.mesh)
    else:
        mesh = topology.make_mesh(run.mesh, topology.topology(request.target))
    start = time.perf_counter()
    program = build_program(run, mesh)
    lowered = program.lower()
    seconds = time.perf_counter() - start
    key = _key(lowered, request, mesh)
    if cache is not None and compiled.is_saved(cache / key):
        known = {"measured": _measured(mesh.devices.flat[0], run, request.target)}
        return {"kind": "step", "key": key, **known}
    step = _compile(lowered, program, run, request, folder / "dumps", seconds)
    step.save(folder / STEP)
    return {"kind": "step", "key": key}


def _key(lowered: jax.stages.Lowered, request: Request, mesh: Mesh) -> str:
    """Of all that decides what is compiled and what is written down of it."""
    device = mesh.devices.flat[0]
    about = {
        "target": request.target,
        "options": _options(request),
        "versions": versions(request.target),
        "device": f"{mesh.size} {device.device_kind}",
        "memory": device_memory(device),
        "compiler": device.client.platform_version if request.target == "local" else "",
        "flags": [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        "step_options": xla_flags.device_options(device.device_kind),
        "axes": dict(mesh.shape),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for module in (compiled, layout, topology, chips, rates, flops, sys.modules[__name__]):
        digest.update(Path(module.__file__).read_bytes())
    digest.update(lowered.as_text(debug_info=True).encode())
    return digest.hexdigest()[:32]


def compile_here(
    program: Program,
    run: RunConfig,
    target: str,
    folder: Path,
    options: Mapping[str, Any] | None = None,
) -> CompiledStep:
    """Compiles the step of a program at hand; that it does not fit is an answer.

    Args:
      target: "local", or the topology whose devices the program's mesh has.
      folder: an empty or absent folder for the compiler's dumps.

    Raises:
      RunError: the compiler fails for another reason.
    """
    request = Request(to_dict(run), target, options or {})
    start = time.perf_counter()
    lowered = program.lower()
    return _compile(lowered, program, run, request, folder, time.perf_counter() - start)


def _compile(
    lowered: jax.stages.Lowered,
    program: Program,
    run: RunConfig,
    request: Request,
    dumps: Path,
    lower_seconds: float,
) -> CompiledStep:
    start = time.perf_counter()
    memory, out_of_memory, hlo = None, None, None
    device = program.mesh.devices.flat[0]
    try:
        executable = _run_compiler(lowered, _options(request), dumps)
    except jax.errors.JaxRuntimeError as error:
        out_of_memory = _out_of_memory(error, dumps)
    else:
        memory, hlo = _memory_analysis(executable), executable.as_text()
    seconds = {"lower": lower_seconds, "compile": time.perf_counter() - start}
    return CompiledStep(
        target=request.target,
        config=request.config,
        mesh=mesh_axes(program.mesh, _wrap(request.target, program.mesh)),
        arguments=arguments_of(program),
        num_params=program.num_params,
        tokens_per_step=run.train.batch_size * run.data.sequence_length,
        model_flops=_model_flops(run),
        seconds=seconds,
        host_peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        versions=versions(request.target),
        memory=memory,
        out_of_memory=out_of_memory,
        hlo=_dump(dumps, "after_optimizations.txt") if hlo is None else hlo,
        buffer_assignment=_dump(dumps, "after_optimizations-buffer-assignment.txt"),
        live_ranges=_dump(dumps, "after_optimizations-live-range.txt"),
        device_kind=device.device_kind,
        device_memory=device_memory(device),
        measured=_measured(device, run, request.target),
    )


def _measured(device: jax.Device, run: RunConfig, target: str) -> Mapping[str, float]:
    if target != "local":
        return {}
    chip = find_chip(device)
    if chip.peak_flops and chip.hbm_bytes_per_second:
        return {}
    return rates.measure_rates(device, run.train.compute_dtype)


def _options(request: Request) -> dict[str, Any]:
    # For the devices at hand training's flags are in the environment, with what the user made of them.
    trained_with = {} if request.target == "local" else xla_flags.compiler_options("tpu")
    return {**trained_with, **request.options}


def _run_compiler(
    lowered: jax.stages.Lowered, options: Mapping[str, Any], dumps: Path
) -> jax.stages.Compiled:
    dump = {"xla_dump_to": str(dumps), "xla_dump_hlo_as_text": True}
    try:
        return lowered.compile(compiler_options={**options, **dump})
    except jax.errors.JaxRuntimeError as error:
        # Some backends take no options for one compilation. The dumps are worth less than the rest.
        if "xla_dump" not in str(error):
            raise
    return lowered.compile(compiler_options=dict(options))


_SIZES = (
    r"\((?P<needed>[\d.]+[KMGT]?)\) exceeds available HBM \((?P<available>[\d.]+[KMGT]?)\)",
    r"Used (?P<needed>[\d.]+[KMGT]?) of (?P<available>[\d.]+[KMGT]?) hbm",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _out_of_memory(error: Exception, dumps: Path) -> OutOfMemory:
    """What a failure says about memory.

    Raises:
      RunError: it is another failure than too little device memory.
    """
    text = str(error)
    line = first_line(error)
    found = next(filter(None, (re.search(pattern, text) for pattern in _SIZES)), None)
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        raise RunError(f"the compiler failed: {line}") from None
    needed, available = (_bytes(found[name]) for name in ("needed", "available"))
    # The compiler's own report has the exact number; the message rounds it, and counts what else a
    # program takes, by which a step may fail that is a few MB short.
    report = _dump(dumps, "after_optimizations-memory-usage-report.txt")
    exact = re.search(r"\(color=0\)\s*Total bytes: (\d+)", report)
    if exact and int(exact[1]) > available and abs(int(exact[1]) - needed) < 0.02 * needed:
        needed = int(exact[1])
    return OutOfMemory(max(needed, available + 1), available, line)


def _bytes(text: str) -> int:
    return int(float(text.rstrip("KMGT")) * _UNITS[text.lstrip("0123456789.")])


def _memory_analysis(executable: jax.stages.Compiled) -> MemoryAnalysis | None:
    found = executable.memory_analysis()
    if found is None:
        return None
    return MemoryAnalysis(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=getattr(found, "peak_memory_in_bytes", None) or None,
    )


def _dump(folder: Path, suffix: str) -> str:
    """The largest dump of a kind: of the step, not of a helper program; "" where there is none."""
    files = sorted(folder.glob(f"*{suffix}"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else ""


def _wrap(target: str, mesh: Mesh) -> Sequence[bool]:
    if target != "local":
        return topology.parse_slices(target).wrap
    coords = [getattr(device, "coords", None) for device in mesh.devices.flat]
    chip = find_chip(mesh.devices.flat[0])
    if None in coords or chip.kind != "tpu":
        return (False,) * 3
    return topology.wrap_of(chip, tuple(max(x) - min(x) + 1 for x in zip(*coords, strict=True)))


def _model_flops(run: RunConfig) -> dict[str, float]:
    """Per token, by both conventions; {} where the model's family does not count them."""
    counts = {
        name: flops_per_token(run, causal_half=causal_half)
        for name, causal_half in (("full", False), ("causal", True))
    }
    return {name: count for name, count in counts.items() if count is not None}


if __name__ == "__main__":
    main()
