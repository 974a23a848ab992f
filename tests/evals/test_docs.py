"""The example of docs/evaluation.md runs as it stands."""

import re
from pathlib import Path

from saved_run import save_run
from tiny import run_config


def test_the_example(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/evaluation.md").read_text(), re.DOTALL)
    model = {"vocab_size": 264, "max_length": 64}
    run = run_config(model=model, data={"tokenizer": {"name": "raw_bytes"}})
    save_run(tmp_path / "runs" / "gpt_tiny", run)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert "'accuracy_per_byte': " in capsys.readouterr().out
