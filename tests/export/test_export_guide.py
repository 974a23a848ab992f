"""Every command of docs/export.md, on a run as the guide has it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from saved_run import save_run
from tiny import run_config

from llm_jax.export import __main__ as export_entry
from llm_jax.export import gguf, hf, quantized
from llm_jax.training.config import RunConfig

GUIDE = Path("docs/export.md")
pytest.importorskip("gguf")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [content for found, content in fenced if found == language]


@pytest.fixture
def run() -> RunConfig:
    model = {"vocab_size": 264, "max_length": 64}
    return run_config(model=model, data={"tokenizer": {"name": "raw_bytes"}})


@pytest.mark.slow
def test_the_guide(tmp_path, monkeypatch, capsys, run):
    commands = [line for block in blocks("") for line in block.splitlines()]
    (code,) = blocks("python")
    save_run(tmp_path / "runs" / "mine", run)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)
        if words[0] in ("pip", "llama-cli"):
            continue
        assert words[:3] == ["python", "-m", "llm_jax.export"]
        monkeypatch.setattr("sys.argv", ["export", *words[3:]])
        export_entry.main()
    exec(compile(code, str(GUIDE), "exec"), {})
    assert "is what was certified" in capsys.readouterr().out
    made = {path.name for path in Path("exported").iterdir()}
    assert made == {"hf", "sharded", "int8", "int4", "gguf"}
    told = json.loads(Path("exported/int4/certificate.json").read_text())["format"]
    assert told["group"] == 64


def test_the_guide_names_the_tolerances():
    found = {
        "hf": hf.make().tolerances,
        "f16": gguf.make().tolerances,
        "bf16": gguf.make(gguf.Config(dtype="bf16")).tolerances,
        "int8": quantized.make().tolerances,
        "int4": quantized.make(quantized.Config(kind="int4")).tolerances,
    }
    text = GUIDE.read_text()
    for name, tolerances in found.items():
        (row,) = [line for line in text.splitlines() if re.match(rf"\| `.*\b{name}\b.*%", line)]
        numbers = [
            float(x) for x in re.findall(r"(?<![\w.])\d*\.?\d+(?![\w.])", row.split("|", 2)[2])
        ]
        wanted = [tolerances.kl_divergence, 100 * tolerances.equal_tokens, tolerances.nats]
        assert numbers[-3:] == pytest.approx(wanted), name
