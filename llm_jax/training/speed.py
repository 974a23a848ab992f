"""How fast a run is, from its steps per second."""

from jax.sharding import Mesh

from llm_jax.core.config import component
from llm_jax.metrics.throughput import mfu
from llm_jax.training.config import RunConfig


def flops_per_token(run: RunConfig, *, causal_half: bool) -> float | None:
    """Model FLOPs of a step over its tokens, batch_size * sequence_length; None: not counted."""
    if not hasattr(run.model, "batch_flops"):
        return None
    objective = component("objectives", run.objective.name).make(run.objective)
    spec = objective.batch_spec(run.train.batch_size, run.data.sequence_length)
    shapes = {name: s.shape for name, s in spec.items()}
    flops = run.model.batch_flops(shapes, causal_half=causal_half)
    flops *= getattr(objective, "model_passes", 1)
    return flops / (run.train.batch_size * run.data.sequence_length)


def throughput(run: RunConfig, mesh: Mesh, steps_per_second: float) -> dict[str, float]:
    """tokens_per_second over all devices, and mfu by both conventions where the peak is known.

    Tokens are the positions of the rows, of an encoder-decoder those of the encoder.
    """
    rate = steps_per_second * run.train.batch_size * run.data.sequence_length
    metrics = {"tokens_per_second": rate}
    for name, causal_half in (("mfu", False), ("mfu_causal_half", True)):
        flops = flops_per_token(run, causal_half=causal_half)
        kind = mesh.devices.flat[0].device_kind
        share = None if flops is None else mfu(rate, flops, mesh.size, kind)
        if share is not None:
            metrics[name] = share
    return metrics
