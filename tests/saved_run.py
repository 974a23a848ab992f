"""A run that was saved before its first step."""

from pathlib import Path

import jax

from llm_jax.checkpoint.manager import Checkpointer, RunFiles, read_folder
from llm_jax.core.config import to_dict
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import RunConfig
from llm_jax.training.program import build_program


def save_run(workdir: Path, run: RunConfig, devices=None) -> None:
    """Writes its checkpoint of step 1, with the tokenizer of bytes."""
    program = build_program(run, make_mesh(run.mesh, devices))
    raw_bytes.make(raw_bytes.Config()).save(workdir / "tokenizer")
    checkpointer = Checkpointer(workdir / "checkpoints", run.checkpoint)
    files = RunFiles(to_dict(run), {}, read_folder(workdir / "tokenizer"))
    checkpointer.save(1, program.init(jax.random.key(0)), files)
    checkpointer.wait()
    checkpointer.close()
