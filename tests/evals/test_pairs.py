"""A model that turns one text into another, from records to scores, texts and an export, as a user types it."""

import json
import random

import pytest

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "model": {"name": "encoder_decoder", "vocab_size": 264, "embed_dim": 32, "num_layers": 1,
                  "num_heads": 2, "max_length": 32, "head_bias": True},
        "data": {"tokenizer": {"name": "raw_bytes"}, "sequence_length": 16, "held_out_fraction": 0.2},
        "objective": {"name": "seq2seq", "target_length": 8},
        "schedule": {"name": "constant", "learning_rate": 3e-3},
        "train": {"num_steps": 4, "batch_size": 8, "compute_dtype": "float32"},
        "eval": {"num_beams": 2, "generate_examples": 10, "sample_prompts": ("abc",), "sample_tokens": 4},
    })
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdef", k=rng.randrange(2, 6))) for _ in range(120)]
    lines = [json.dumps({"source": text, "target": text[::-1]}) for text in texts]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pairs.py").write_text(CONFIG)
    return folder


@pytest.mark.slow
def test_from_records_to_an_export(run_python, folder, tmp_path):
    work, data = tmp_path / "work", folder / "pairs.jsonl"
    result = run_python("-m", "llm_jax.train", "--config", folder / "pairs.py", "--workdir", work,
                        "--data", data)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "exact_match_beams" in result.stdout
    assert "sample: 'abc'" in result.stdout
    scores = json.loads((work / "evals" / "scores_4.json").read_text())
    summary = scores["summary"]
    assert {"loss", "sequence_accuracy", "exact_match"} <= summary.keys()
    assert summary["generated_examples"] == 10
    assert all(target == source[::-1] for source, _, target in scores["examples"])

    result = run_python("-m", "llm_jax.evaluate", "--workdir", work)
    assert result.returncode == 0, result.stderr
    again = json.loads((work / "evals" / "scores_4.json").read_text())["summary"]
    assert again == pytest.approx(summary, rel=1e-5)

    generate = ["-m", "llm_jax.generate", "--workdir", work, "--prompt", "fed", "--max_tokens", 4]
    beams = run_python(*generate, "--num_beams", 3)
    assert beams.returncode == 0, beams.stderr
    assert "score -" in beams.stderr

    result = run_python("-m", "llm_jax.export", "--workdir", work, "--out", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["architectures"] == ["MarianMTModel"]
    assert written["decoder_start_token_id"] == written["pad_token_id"] is not None


@pytest.mark.slow
def test_a_target_that_is_too_long_is_one_line(run_python, folder, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"source": "a", "target": "b" * 40}) + "\n")
    result = run_python("-m", "llm_jax.train", "--config", folder / "pairs.py", "--workdir",
                        tmp_path / "work", "--data", data,
                        "--config.data.held_out_fraction=0")  # fmt: skip
    assert result.returncode == 1
    assert "long.jsonl:1" in result.stderr
    assert "Traceback" not in result.stderr
