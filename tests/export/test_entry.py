"""`python -m llm_jax.export`: its flags, its model card, and that it leaves nothing half done."""

import json

import pytest
from saved_run import save_run
from tiny import run_config

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.export import __main__ as entry
from llm_jax.export.card import _without_paths


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"the text of number {number}\n" * 40)
    data = {
        "tokenizer": {"name": "raw_bytes"},
        "sources": [{"name": "text", "path": str(texts)}],
    }
    run = run_config(model={"vocab_size": 264, "max_length": 64}, data=data)
    save_run(folder / "run", run)
    (folder / "run" / "evals").mkdir()
    scores = {"step": 1, "summary": {"bits_per_byte": 1.25, "tokens": 4321}}
    (folder / "run" / "evals" / "scores_1.json").write_text(json.dumps(scores))
    return folder / "run"


def export(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    entry.main()


def test_an_export_is_verified_and_has_a_card(workdir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my model"
    export(monkeypatch, "--workdir", workdir, "--out", out)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"exported to {out}"
    assert said[-2].startswith("certified: ")
    export(monkeypatch, "--verify", out)
    assert "is what was certified" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert head.splitlines() == [
        "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- llm_jax", "- gpt",
    ]  # fmt: skip
    for fact in ("# my model\n", "| steps | 1 |", "| bits_per_byte | 1.2500 |", "| tokens | 4,321 |",
                 "raw_bytes, 259 ids", 'GPT2LMHeadModel' if "GPT2" in body else "LlamaForCausalLM",
                 "| text: texts | 1 |", '"learning_rate": 0.01'):  # fmt: skip
        assert fact in body, fact
    # Where the run lived is nobody's business.
    assert str(workdir.parent) not in card
    assert str(workdir.parent) not in (out / "certificate.json").read_text()
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["step"] == 1
    assert certificate["texts"] == "held out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--workdir is missing"),
        (["--workdir", "x"], "--out is missing"),
        (["--verify", "x", "--out", "y"], "--verify takes no --out"),
        (["--verify", "x", "--option", "a=1"], "--verify takes no --option"),
        (["--verify", "/nowhere"], "/nowhere has no certificate.json"),
        (["--workdir", "x", "--out", "y", "--option", "shard=1"],
         "--option of hf.shard: unknown key; did you mean 'shard_bytes'?"),
        (["--workdir", "x", "--out", "y", "--option", "shard_bytes"], "expected section.key=value"),
        (["--workdir", "x", "--out", "y", "--format", "ggul"], "did you mean 'gguf'"),
        (["--workdir", "x", "--out", "y", "--option", "name=gguf"], "--option name: the format is --format's"),
    ],
)  # fmt: skip
def test_wrong_flags_are_answered_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RunError, ConfigError)) as error:
        export(monkeypatch, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tampered_folder_fails_the_command(workdir, tmp_path, run_python):
    done = run_python("-m", "llm_jax.export", "--workdir", workdir, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace("silu", "gelu"))
    done = run_python("-m", "llm_jax.export", "--verify", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"error: {tmp_path / 'out'}: config.json is not what was certified: another SHA-256"
    ]


def test_paths_lose_what_they_tell_of_the_machine():
    config = {
        "a": "/home/me/data/texts", "b": "hf:/home/me/model", "c": "gs://bucket/x", "d": ["~/x/y", 3],
        "e": "python:stdlib", "f": "relative/path", "g": "/home/me/run@300",
    }  # fmt: skip
    assert _without_paths(config) == {
        "a": "texts", "b": "hf:model", "c": "gs://bucket/x", "d": ["y", 3], "e": "python:stdlib",
        "f": "relative/path", "g": "run@300",
    }  # fmt: skip
