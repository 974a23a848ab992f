"""What docs/serving.md tells to type works as it stands, on another port."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import save_chat_run, serving

from llm_jax.serve.__main__ import parser

GUIDE = Path("docs/serving.md").read_text(encoding="utf-8")
LINES = re.findall(r"^python -m llm_jax\.serve (.*)$", GUIDE, re.MULTILINE)


def test_every_flag_of_the_guide_is_one_and_the_other_way_round():
    known = {o for action in parser()._actions for o in action.option_strings if o.startswith("--")}
    named = set(re.findall(r"--\w+", GUIDE))
    assert named <= known
    assert {"--help", "--step", "--port", "--num_slots"} | named >= known - {"--help"}


@pytest.mark.slow
def test_the_guide(tmp_path, monkeypatch, run_python):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    save_chat_run(tmp_path / "runs" / "gpt_tiny")
    sources = f"{Path.cwd()}"
    monkeypatch.setenv("PYTHONPATH", sources)
    monkeypatch.chdir(tmp_path)
    exported = run_python("-m", "llm_jax.export", "--workdir", "runs/gpt_tiny", "--out", "exported")
    assert exported.returncode == 0, exported.stderr
    run, folder = LINES
    with serving(*folder.split()) as server:
        assert json.loads(server.get("/v1/models")[2])["data"][0]["id"] == "exported"
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
        assert server.post("/v1/chat/completions", body)[0] == 400
        assert server.post("/v1/completions", {"prompt": "a"})[0] == 200
    with serving(*run.split()) as server:
        (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
        code = code.replace("http://127.0.0.1:8000", server.url)
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
        assert found.returncode == 0, found.stderr
        assert found.stdout
        blocks = re.findall(r"```\n(curl.*?)```", GUIDE, re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            script = "set -e\n" + block.replace("http://127.0.0.1:8000", server.url)
            found = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120)
            assert found.returncode == 0
            assert b'"error"' not in found.stdout
            assert found.stdout
