"""A small GPT's training step, compiled for eight fake devices in a few seconds."""

import tempfile
from pathlib import Path
from typing import Any

from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.worker import compile_here
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program


def compile_small(mesh: dict[str, Any], *, length: int = 128, **model: Any) -> CompiledStep:
    """One sequence per device and turn of accumulation; `model` overrides its config."""
    config = {
        "model": {
            "name": "gpt", "vocab_size": 512, "embed_dim": 64, "num_layers": 3, "num_heads": 4,
            "num_kv_heads": 2, "mlp_dim": 192, "max_length": length, "remat": "full", **model,
        },
        "data": {"sequence_length": length, "tokenizer": {"name": "raw_bytes"}},
        "mesh": mesh,
        "train": {"num_steps": 10, "batch_size": 64},
    }  # fmt: skip
    run = resolve(config)
    program = build_program(run, make_mesh(run.mesh))
    with tempfile.TemporaryDirectory() as folder:
        return compile_here(program, run, "local", Path(folder))
