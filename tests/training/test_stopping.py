"""Early stopping: when it ends a run, which step it keeps, and that a resumed run decides alike."""

import json
import math
import shutil

import jax
import pytest

from llm_jax import train as entry
from llm_jax.checkpoint.load import load_model
from llm_jax.checkpoint.manager import read_run_files, steps_in
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.training.config import EvalConfig, resolve
from llm_jax.training.program import Program, build_program
from llm_jax.training.stopping import Stopping, after, is_larger_better


def noted(metric, values):
    state = None
    for step, value in enumerate(values, start=1):
        state = after(state, metric, step, {metric: value})
    return state


def test_the_best_evaluation():
    assert noted("loss", [3.0, 2.0, 2.5, 2.0]) == Stopping("loss", 2, 2.0, worse=2)
    assert noted("accuracy", [0.5, 0.7, 0.6]) == Stopping("accuracy", 2, 0.7, worse=1)
    assert noted("loss", [math.nan, 2.0, math.nan]) == Stopping("loss", 2, 2.0, worse=1)
    assert Stopping("loss", 2, 2.0, 2).is_over(EvalConfig(every=1, patience=2))
    assert not Stopping("loss", 2, 2.0, 2).is_over(EvalConfig(every=1, patience=3))


def test_what_is_better():
    larger = (
        "accuracy", "token_accuracy", "pair/accuracy", "exact_match", "f1", "answer/f1",
        "quiz/accuracy_per_byte", "code/pass@10", "generation/bleu", "linear_probe/layer/3",
        "harness/hellaswag/acc_norm", "harness/gsm8k/exact_match/strict-match", "exact_match_beams",
    )  # fmt: skip
    assert all(map(is_larger_better, larger))
    smaller = ("loss", "cross_entropy", "perplexity", "moe/load_balance", "accuracy_gap",
               "quiz/calibration_error", "bias/gap")  # fmt: skip
    assert not any(map(is_larger_better, smaller))


def test_a_saved_state_serves_the_metric_it_was_made_for():
    saved = Stopping("loss", 2, 2.0, 1).to_dict()
    assert Stopping.saved(saved, EvalConfig(every=1, patience=3)) == Stopping("loss", 2, 2.0, 1)
    assert Stopping.saved(saved, EvalConfig(every=1, patience=3, metric="accuracy")) is None
    assert Stopping.saved(saved, EvalConfig(every=1)) is None
    assert Stopping.saved(None, EvalConfig(every=1, patience=3)) is None


def run_of(corpus, num_steps=40, **evaluation):
    """A learning rate of nothing: every evaluation equals the first one, which stays the best."""
    return resolve({
        "model": {"name": "gpt", "vocab_size": 384, "embed_dim": 16, "num_layers": 1, "num_heads": 2,
                  "mlp_dim": 32, "max_length": 32},
        "data": {"sequence_length": 32, "tokenizer": {"name": "raw_bytes"}, "held_out_fraction": 0.1,
                 "sources": [{"name": "text", "path": str(corpus / "code")}]},
        "schedule": {"learning_rate": 1e-30},
        "train": {"num_steps": num_steps, "batch_size": 2},
        "checkpoint": {"save_every": 3, "keep_last": 1},
        "eval": {"every": 2, "max_batches": 1, "patience": 3, **evaluation},
    })  # fmt: skip


def on_one_device(config):
    return make_mesh(config, jax.devices()[:1])


@pytest.fixture
def train(monkeypatch, capsys):
    """Trains; gives the step that is concluded with, and what was said."""
    # Compiled once: the runs differ in what the step does not know.
    programs: list[Program] = []

    def program(run, mesh):
        programs[:] = programs or [build_program(run, mesh)]
        return programs[0]

    def run(config, workdir):
        concluded = []
        monkeypatch.setattr(entry, "make_mesh", on_one_device)
        monkeypatch.setattr(entry, "build_program", program)
        monkeypatch.setattr(entry, "conclude", lambda *_, step, **__: concluded.append(step))
        capsys.readouterr()
        assert entry.train(config, workdir, "test") is None
        return concluded[0], capsys.readouterr().out

    return run


def steps(workdir):
    folder = workdir / "checkpoints"
    return steps_in(folder), read_run_files(folder, steps_in(folder)[-1]).stopping


def test_a_run_ends_when_patience_does_and_uses_its_best_step(corpus, tmp_path, train):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    step, said = train(run_of(corpus), whole)
    assert step == 2
    assert "loss has been no better for 3 evaluations than at step 2: training ends" in said
    assert "step 2 was the best and is used" in said
    assert steps(whole)[0] == [2, 8]
    assert load_model(whole).step == 2
    assert load_model(whole, 8).step == 8

    step, said = train(run_of(corpus), whole)
    assert step == 2
    assert "training ended early, step 2 being the best: nothing is left to train" in said
    evaluations = [
        json.loads(line)
        for line in (whole / "metrics.jsonl").read_text().splitlines()
        if "eval" in line
    ]
    assert len(evaluations) == 4

    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "8")
    train(run_of(corpus, num_steps=9, patience=4), parts)  # at its last step it evaluates, too
    assert steps(parts) == ([2, 9], {**steps(whole)[1], "worse": 4})


def test_a_task_may_say_when_to_stop(corpus, tmp_path, train):
    """Asked every 4 steps, it is as good each time: the first is the best, the third after it ends the run."""
    path = tmp_path / "quiz.jsonl"
    path.write_text(json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    quiz = {"name": "multiple_choice", "path": str(path), "label": "quiz"}
    asked = {"tasks": [quiz], "tasks_every": 4, "metric": "quiz/accuracy", "patience": 2}
    step, said = train(run_of(corpus, **asked), tmp_path / "a")
    assert step == 4
    assert "quiz/accuracy has been no better for 2 evaluations than at step 4" in said
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    found = {r["step"] for r in map(json.loads, lines) if "eval/quiz/accuracy" in r}
    assert found == {4, 8, 12}
    wrong = asked | {"metric": "quiz/acuracy"}
    with pytest.raises(RunError, match="'quiz/acuracy' is not measured; did you mean 'quiz/acc"):
        train(run_of(corpus, **wrong), tmp_path / "b")
    with pytest.raises(ConfigError, match="there is no file nowhere"):
        train(run_of(corpus, tasks=[quiz | {"path": "nowhere"}]), tmp_path / "c")
    assert not (tmp_path / "c" / "data").exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": None}, "eval.patience = 3 counts evaluations: set eval.every"),
        ({"patience": 0}, "eval.patience = 0 must be at least 1"),
        ({"metric": "acuracy"}, "metric = 'acuracy'; did you mean 'accuracy'"),
    ],
)
def test_errors(corpus, evaluation, message):
    with pytest.raises(ConfigError, match=message):
        build_program(run_of(corpus, **evaluation), on_one_device(MeshConfig()))
