"""The planner inside a run: what is about to run here, and why a run died out of memory.

Both compile the run's own program once more, for the devices at hand, with the compiler's memory
reports on. An explanation is of a training step, since that is what a config sizes; where the step
fits, or where something else asked for the memory, it says so and blames nothing on the step.
"""

import re
import tempfile
import traceback
from pathlib import Path

import jax
from rich.console import Console

from llm_jax.core.flags import RunError, first_line
from llm_jax.planner import words
from llm_jax.planner.chips import device_memory
from llm_jax.planner.cure import with_tried_cure
from llm_jax.planner.layout import arguments_of
from llm_jax.planner.make import make_plan
from llm_jax.planner.plan import Plan
from llm_jax.planner.terminal import show_plan
from llm_jax.planner.topology import parse_target
from llm_jax.planner.worker import compile_here
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training import peers
from llm_jax.training.config import RunConfig
from llm_jax.training.program import Program, build_program

# What a run was at when memory ended, by the function that was running. A step runs on beside all
# of them; that it failed is known where its metrics are read. In all other places it was a step, too.
_AT = {
    "_read": "",
    "restore_or_init": "while the state was made or restored",
    "conclude": "while evaluating the trained model",
    "evaluate": "while evaluating",
    "_save": "while saving a checkpoint",
}


def plan_here(program: Program, run: RunConfig) -> Plan:
    """The plan of a program on the devices of this process."""
    # With it, the processes of a run would tune kernels together, and wait for those that do not.
    alone = {"xla_gpu_shard_autotuning": False}
    several = jax.process_count() > 1 and program.mesh.devices.flat[0].platform == "gpu"
    with tempfile.TemporaryDirectory(prefix="llm_jax_plan_") as folder:
        options = alone if several else {}
        step = compile_here(program, run, "local", Path(folder) / "dumps", options)
    return make_plan(step, parse_target("local"))


def show_step(program: Program, run: RunConfig) -> None:
    """Prints memory, roofline and communication of the step that is about to run."""
    show_plan(plan_here(program, run), Console())


def check_state(program: Program) -> None:
    """Refuses a state that its devices cannot hold, before it is made.

    On a CPU nobody else would: the kernel kills the process, or XLA waits for ever.

    Raises:
      RunError: says what takes how much of how much.
    """
    memory = device_memory(program.mesh.local_devices[0])
    state = [one for one in arguments_of(program) if one.kind != "batch"]
    needed = sum(one.bytes for one in state)
    if memory is None or needed <= memory:
        return
    parameters = sum(one.bytes for one in state if one.kind in ("parameter", "extra"))
    raise RunError(
        f"out of device memory: the state takes {words.gib(needed)} GiB of the {words.gib(memory)} of "
        f"a device, {words.gib(parameters)} of them parameters; share it among more devices with "
        "config.mesh.fsdp, or make the model smaller"
    )


def out_of_memory(error: Exception, run: RunConfig) -> RunError | None:
    """What to raise instead of `error` when devices ran out of memory; None for another error.

    The explanation is printed, by process 0; the RunError says it in a line.
    """
    text = str(error)
    exhausted = "RESOURCE_EXHAUSTED" in text and re.search("memory|allocat", text)
    if not exhausted and "out of memory" not in text.lower():
        return None
    asked = _asked(text, _stage(error))
    with peers.explaining():
        if jax.process_index() != 0:
            return RunError(asked)
        # The frames of the run hold its arrays; the compiler may need the memory.
        traceback.clear_frames(error.__traceback__)
        try:
            plan = _plan_of(run)
            if not plan.fits:
                plan = with_tried_cure(plan, run, _plan_of)
            show_plan(plan, Console(stderr=True))
        except Exception as failure:  # whatever it is, it must not hide what ended the run
            kind = "" if isinstance(failure, RunError) else f"{type(failure).__name__}: "
            return RunError(
                f"{asked} (the compiler could not say why: {kind}{first_line(failure)})"
            )
        return RunError(f"{asked}; {_reason(plan)}")


def _plan_of(run: RunConfig) -> Plan:
    return plan_here(build_program(run, make_mesh(run.mesh)), run)


def _reason(plan: Plan) -> str:
    if plan.fits:
        return (
            f"a training step by itself {words.verdict(plan)}: something else holds the rest, another "
            "program or another part of this run"
        )
    return next(finding.text for finding in plan.findings if finding.kind == "memory")


def _stage(error: Exception) -> str:
    """What the run was at, "" for a step."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    return next((stage for name, stage in _AT.items() if name in names), "")


def _asked(text: str, stage: str) -> str:
    """The allocator's line, without the prefix that names the status, and what the run was at."""
    line = re.sub(r"^(\w+: )?RESOURCE_EXHAUSTED: (E\d+: )?", "", text.splitlines()[0])
    line = re.sub(r"^Out of memory (?=\w)", "", line)
    line = re.sub(r"\b(\d{4,}) bytes", lambda found: words.size(int(found[1])), line)
    return f"out of device memory: {line.rstrip('.')}" + (f", {stage}" if stage else "")
