"""The examples of docs/generation.md run as they stand."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from saved_run import save_run
from tiny import run_config

from llm_jax.generate import __main__ as entry


@pytest.mark.slow
def test_the_examples(tmp_path, monkeypatch, capsys):
    text = Path("docs/generation.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"python -m llm_jax.generate (.*)", text)
    model = {"vocab_size": 264, "max_length": 64}
    run = run_config(model=model, data={"tokenizer": {"name": "raw_bytes"}})
    save_run(tmp_path / "runs" / "gpt_tiny", run)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in codes:
        exec(compile(code, "docs/generation.md", "exec"), names)
    assert len(names["texts"]) == 2
    assert all(isinstance(text, str) for text in names["texts"].values())
    monkeypatch.setattr(sys, "argv", ["generate", *shlex.split(command)])
    capsys.readouterr()
    entry.main()
    assert "== prompt 2 of 2 ==\nimport" in capsys.readouterr().out
