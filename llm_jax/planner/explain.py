"""The planner inside a run: what is about to run here, and why a run died out of memory.

Both compile the run's own program once more, for the devices at hand, with the compiler's memory
reports on.
"""

import re
import tempfile
from pathlib import Path

import jax
from rich.console import Console

from llm_jax.core.flags import RunError
from llm_jax.planner.make import make_plan
from llm_jax.planner.plan import Plan
from llm_jax.planner.terminal import show_plan
from llm_jax.planner.topology import parse_target
from llm_jax.planner.worker import compile_here
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import RunConfig
from llm_jax.training.program import Program, build_program


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


def out_of_memory(error: Exception, run: RunConfig) -> RunError | None:
    """What to raise instead of `error` when devices ran out of memory; None for another error.

    The explanation is printed; the RunError says it in a line.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    if jax.process_index() == 0:
        program = build_program(run, make_mesh(run.mesh))
        try:
            plan = plan_here(program, run)
        except RunError as failure:
            return RunError(f"{_first_line(text)} (the compiler could not say why: {failure})")
        show_plan(plan, Console(stderr=True))
        changes = [f.text for f in plan.findings if f.kind == "memory" and f.change]
        if changes:
            return RunError(f"{_first_line(text)}; {changes[0]}")
    return RunError(_first_line(text))


def _first_line(text: str) -> str:
    """The allocator's line, without the prefix that names the status."""
    line = re.sub(r"^(\w+: )?RESOURCE_EXHAUSTED: (E\d+: )?", "", text.splitlines()[0])
    return f"out of device memory: {line.rstrip('.')}"
