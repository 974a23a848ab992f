"""The example of docs/evaluation.md runs as it stands."""

import re
from pathlib import Path

import jax
from tiny import run_config

from llm_jax.checkpoint.manager import Checkpointer, RunFiles, read_folder
from llm_jax.core.config import to_dict
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.program import build_program


def test_the_example(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/evaluation.md").read_text(), re.DOTALL)
    run = run_config(
        model={"vocab_size": 264, "max_length": 64}, data={"tokenizer": {"name": "raw_bytes"}}
    )
    workdir = tmp_path / "runs" / "gpt_tiny"
    program = build_program(run, make_mesh(run.mesh))
    raw_bytes.make(raw_bytes.Config()).save(workdir / "tokenizer")
    checkpointer = Checkpointer(workdir / "checkpoints", run.checkpoint)
    files = RunFiles(to_dict(run), {}, read_folder(workdir / "tokenizer"))
    checkpointer.save(1, program.init(jax.random.key(0)), files)
    checkpointer.wait()
    checkpointer.close()
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert "'accuracy_per_byte': " in capsys.readouterr().out
