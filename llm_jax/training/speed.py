"""How fast a run is, from its steps per second."""

from jax.sharding import Mesh

from llm_jax.metrics.throughput import mfu, transformer_flops
from llm_jax.training.config import RunConfig


def throughput(run: RunConfig, mesh: Mesh, steps_per_second: float) -> dict[str, float]:
    """tokens_per_second over all devices, and mfu by both conventions where the peak is known."""
    rate = steps_per_second * run.train.batch_size * run.data.sequence_length
    metrics = {"tokens_per_second": rate}
    if not hasattr(run.model, "flops_sizes"):
        return metrics
    for name, causal_half in (("mfu", False), ("mfu_causal_half", True)):
        flops = transformer_flops(
            **run.model.flops_sizes(),
            sequence_length=run.data.sequence_length,
            causal_half=causal_half,
        )
        kind = mesh.devices.flat[0].device_kind
        share = mfu(rate, flops, mesh.size, kind)
        if share is not None:
            metrics[name] = share
    return metrics
