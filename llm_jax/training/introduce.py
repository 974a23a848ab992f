"""What a run says before its first step."""

from collections.abc import Callable

import jax

from llm_jax.metrics.throughput import peak_flops
from llm_jax.nn.pipeline import bubble, count_microbatches
from llm_jax.training.config import RunConfig, describe
from llm_jax.training.program import Program


def introduce(run: RunConfig, program: Program, say: Callable[[str], None]) -> None:
    """Says what is about to run, and on what."""
    say(describe(run))
    sizes = [f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1]
    shape = " x ".join(sizes) or "of one device"
    kind = jax.devices()[0].device_kind
    if program.mesh.shape["pipeline"] > 1:
        rules = program.rules
        micro = count_microbatches(rules, run.model.num_layers, run.train.microbatch_size)
        shape += f" (a stage waits {bubble(rules, micro):.1%} of the time)"
    say(f"{program.num_params:,} parameters on {jax.device_count()} {kind}, mesh {shape}")
    if program.num_trained != program.num_params:
        say(f"{program.num_trained:,} numbers are trained")
    if peak_flops(kind) is None:
        say(f"no peak FLOP/s known for {kind!r}: MFU is not reported")
