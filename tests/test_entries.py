"""The commands as a user types them, errors included."""

import importlib.util
import json
import os
import re

import pytest

TRAIN = ["-m", "llm_jax.train", "--config", "configs/gpt_tiny.py"]
SMALL = [
    "--config.data.tokenizer.vocab_size=512", "--config.model.vocab_size=512",
    "--config.model.num_layers=1", "--config.model.embed_dim=64", "--config.data.sequence_length=64",
    "--config.train.num_steps=3", "--config.schedule.warmup_steps=1",
    "--config.eval.final_bytes=4000", "--config.eval.sample_tokens=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(80):
        body = "".join(f"def f{i}_{j}(value):\n    return value + {i * j}\n\n" for j in range(12))
        (folder / f"{i:02d}.py").write_text(body + "# 你好，世界\n")
    return folder


def test_from_text_to_export(run_python, texts, tmp_path):
    work = tmp_path / "work"
    result = run_python("-m", "llm_jax.prepare", *TRAIN[2:], "--workdir", work, "--data", texts,
                        *SMALL[:1])  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "held out" in result.stdout
    result = run_python(*TRAIN, "--workdir", work, "--data", texts, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "tokenizing" not in result.stdout + result.stderr  # prepared before
    assert "beats gzip -9 on" in result.stdout
    assert "sample: 'def main('" in result.stdout
    assert "<html" in (work / "report.html").read_text()
    record = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "learning_rate", "grad_norm"} <= record.keys()

    result = run_python("-m", "llm_jax.evaluate", "--workdir", work)
    assert result.returncode == 0, result.stderr
    trained = json.loads((work / "evals" / "scores_3.json").read_text())
    assert trained["summary"]["bits_per_byte"] > 0
    assert f"perplexity {trained['summary']['perplexity']:.2f}" in result.stdout

    generate = ["-m", "llm_jax.generate", "--workdir", work, "--prompt", "def f", "--max_tokens", 5]
    first, second = run_python(*generate), run_python(*generate)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout

    result = run_python("-m", "llm_jax.export", "--workdir", work, "--out", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.num_step=3"], "config.train.num_step: unknown key; did you mean 'num_steps'?"),
        (["--config.trian.num_steps=3"], "config.trian: unknown section; did you mean 'train'?"),
        (["--config.train.num_steps=many"], "config.train.num_steps = 'many': expected int"),
        (["--config.model.name=gtp"], "models has no 'gtp'; did you mean 'gpt'?; choices: bert, encoder_decoder, gpt"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--confg", "x"], "unknown flag '--confg'; did you mean '--config'?"),
        (["--config.data.sequence_length=1024"], "1024 exceeds config.model.max_length 512"),
        (["--config.mesh.fsdp=3"], "mesh fsdp 3 does not divide over 1 devices: the nearest that works is fsdp=1"),
        (["--config.train.accumulate_steps=3"], "batch_size 8 is not a multiple of"),
    ],
)  # fmt: skip
def test_errors_are_one_line(run_python, tmp_path, arguments, message):
    result = run_python(*TRAIN, "--workdir", tmp_path / "work", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_vocabulary_that_does_not_fit(run_python, texts, tmp_path):
    result = run_python(*TRAIN, "--workdir", tmp_path / "w", "--data", texts, *SMALL,
                        "--config.model.vocab_size=300")  # fmt: skip
    assert result.returncode == 1
    assert "config.model.vocab_size 300 is smaller than the tokenizer's 512" in result.stderr


def test_missing_runs_are_named(run_python, tmp_path):
    for entry, more in (("evaluate", []), ("generate", []), ("export", ["--out", tmp_path / "o"])):
        result = run_python("-m", f"llm_jax.{entry}", "--workdir", tmp_path / "none", *more)
        assert result.returncode == 1
        assert "no checkpoints at" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.slow  # five commands
def test_nobody_looks_for_chips_that_are_not_there(run_python, texts, tmp_path, monkeypatch):
    """The extra for planning is installed: nothing looks for a TPU, though nobody named a platform."""
    if os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
        pytest.skip("there is a TPU")
    monkeypatch.delenv("JAX_PLATFORMS")
    wake = {"TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0"}  # libtpu would say what it does
    work = ["--workdir", tmp_path / "work"]
    for entry, *flags in (
        ["prepare", *TRAIN[2:], "--data", texts, *SMALL[:1]],
        ["train", *TRAIN[2:], "--data", texts, *SMALL, "--config.train.num_steps=2"],
        ["evaluate"],
        ["generate", "--prompt", "def f", "--max_tokens", 2],
        ["export", "--out", tmp_path / "hf"],
    ):
        result = run_python("-m", f"llm_jax.{entry}", *work, *flags, env=wake)
        assert result.returncode == 0, result.stderr
        found = re.search(
            r"(?<!ou)tpu|metadata\.google", result.stdout + result.stderr, re.IGNORECASE
        )
        assert not found, (entry, result.stderr)
