"""Jobs that score a run's checkpoints: each once, whoever dies, and what is gone or damaged is said."""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from saved_run import save_run
from tiny import run_config

from llm_jax import evaluate as entry
from llm_jax.checkpoint.claims import Claims
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.evals.evaluation import Evaluation
from llm_jax.evals.watch import Watcher
from llm_jax.metrics.scores import read_scores, scored_steps

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{"name": "gpt", "vocab_size": 384, "embed_dim": 32, "num_layers": 1,
                  "num_heads": 4, "mlp_dim": 64, "max_length": 32}},
        "data": {{"sequence_length": 32, "tokenizer": {{"name": "raw_bytes"}},
                 "sources": [{{"name": "text", "path": "{corpus}/code"}},
                             {{"name": "text", "path": "{corpus}/prose"}}]}},
        "schedule": {{"learning_rate": 1e-2}},
        "train": {{"num_steps": 40, "batch_size": 4, "compute_dtype": "float32"}},
        "checkpoint": {{"save_every": 4, "keep_last": 20}},
        "eval": {{"final_bytes": 2000}},
    }})
"""


def start(module, *flags):
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].split(" ", 1)[1]}
    return subprocess.Popen(
        [sys.executable, "-m", f"llm_jax.{module}", *map(str, flags)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def scored_by(output):
    return [int(step) for step in re.findall(r"^step (\d+): loss", output, re.MULTILINE)]


@pytest.mark.slow
def test_a_trainer_and_two_jobs_of_which_one_is_killed(corpus, tmp_path):
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG.format(corpus=corpus))
    watch = ("evaluate", "--watch", "--workdir", workdir, "--takeover_after", 5)
    jobs = [start("train", "--config", config, "--workdir", workdir), start(*watch), start(*watch)]
    try:
        victim, deadline = jobs[2], time.monotonic() + 120
        claims = Claims(workdir, "test", patience=5)
        while True:  # its first checkpoint takes it seconds, to compile
            holders = {claims.holder(step) or "" for step in range(0, 41, 4)}
            if any(holder.endswith(f"process {victim.pid}") for holder in holders):
                break
            assert victim.poll() is None, victim.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
        outputs = [job.communicate(timeout=240)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0, -signal.SIGKILL], "\n".join(outputs)
    times = collections.Counter(step for output in outputs for step in scored_by(output))
    assert times.pop(40, 0) <= 1  # the trainer scores the step that it ends with
    assert times == dict.fromkeys(range(4, 40, 4), 1), "\n".join(outputs)
    scores = read_scores(workdir)
    assert list(scores) == list(range(4, 41, 4))
    assert scores[40]["loss"] < scores[4]["loss"]
    assert scores[4]["bits_per_byte"] != scores[4][f"bits_per_byte/{corpus}/code"]
    assert list((workdir / "evals" / "claims").iterdir()) == []
    assert "Scores of checkpoints" in (workdir / "report.html").read_text()
    events = sorted(path.name for path in (workdir / "tensorboard" / "scores").iterdir())
    assert len(events) in (9, 10)


@pytest.fixture
def saved(tmp_path):
    """A run of one question, with a checkpoint of step 1."""
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"context": "a", "choices": [" b", " c"], "answer": 0}) + "\n")
    run = run_config(
        model={"vocab_size": 264},
        data={
            "sources": [{"name": "text", "path": str(tmp_path / "none.txt")}],
            "tokenizer": {"name": "raw_bytes"},
        },
        eval={"tasks": [{"name": "multiple_choice", "path": str(path)}]},
    )
    save_run(tmp_path / "run", run, jax.devices()[:1])
    return tmp_path / "run"


def evaluate(monkeypatch, workdir, *flags):
    monkeypatch.setattr("sys.argv", ["evaluate", "--workdir", str(workdir), *map(str, flags)])
    entry.main()


def test_once_scores_what_has_no_scores(saved, monkeypatch, capsys):
    evaluate(monkeypatch, saved, "--once")
    said = capsys.readouterr().out
    assert (
        "none.txt" in said
    )  # the corpus is gone: the objective's evaluator says so, the task goes on
    assert "step 1: multiple_choice/accuracy" in said
    assert read_scores(saved)[1]["multiple_choice/questions"] == 1
    before = (saved / "evals" / "scores_1.json").read_bytes()
    evaluate(monkeypatch, saved, "--once")
    assert "step 1" not in capsys.readouterr().out
    assert (saved / "evals" / "scores_1.json").read_bytes() == before


def test_a_step_that_another_has_is_left_to_it(saved, monkeypatch, capsys):
    claim = Claims(saved, "other").take(1)
    evaluate(monkeypatch, saved, "--once")
    assert scored_steps(saved) == []
    with claim.held():
        pass
    evaluate(monkeypatch, saved, "--once", "--config.eval.tasks.0.label", "letters")
    assert "letters/accuracy" in read_scores(saved)[1]


def test_a_config_of_its_own(saved, monkeypatch, tmp_path):
    config = tmp_path / "other.py"
    config.write_text('def get_config():\n    return {"eval": {"tasks": [{"name": "bias"}]}}\n')
    with pytest.raises((ConfigError, RunError), match="path is missing"):
        evaluate(monkeypatch, saved, "--config", config)
    with pytest.raises(
        ConfigError, match=r"train\.num_steps=3: of a trained run only config\.eval"
    ):
        evaluate(monkeypatch, saved, "--config.train.num_steps=3")


def watcher(workdir, score, **arguments):
    said = []
    return Watcher(workdir, score, said.append, patience=60.0, **arguments), said


def test_removed_while_read_and_damaged(saved):
    folder = saved / "checkpoints"
    for step in (2, 3, 4):
        shutil.copytree(folder / "1", folder / str(step))
    scored = []

    def score(step):
        if step == 2:
            shutil.rmtree(folder / "2")
            raise ConfigError("no checkpoint of step 2")
        if step == 3:
            raise ConfigError("checkpoint 3 cannot be read")
        scored.append(step)
        return Evaluation(step, {"loss": 1.0})

    job, said = watcher(saved, score)
    job.run(once=True)
    assert scored == [1, 4]
    assert "step 2 was removed before it was scored" in said
    assert job.failed == {3: "checkpoint 3 cannot be read"}
    assert scored_steps(saved) == [1, 4]
    assert list((saved / "evals" / "claims").iterdir()) == []


def test_one_that_was_too_slow_leaves_the_step_to_who_took_over(saved):
    def score(step):
        (path,) = (saved / "evals" / "claims").iterdir()
        os.utime(path, (0, 0))
        assert Claims(saved, "other").take(step) is not None
        return Evaluation(step, {"loss": 1.0})

    job, said = watcher(saved, score)
    job.run(once=True)
    assert "taken over by another job" in "".join(said)
    assert scored_steps(saved) == []


def test_a_step_that_is_written_anew_is_scored_after_all(saved):
    """And one whose scores lack what this job asks is not done, but keeps them."""
    folder, broken = saved / "checkpoints" / "1", [True]

    def score(step):
        if broken:
            raise ConfigError("cannot be read")
        return Evaluation(step, {"harness/a/acc": 1.0})

    job, said = watcher(saved, score, labels=("harness",))
    job.run(once=True)
    assert job.failed == {1: "cannot be read"}
    broken.clear()
    os.utime(folder, ns=(0, 0))
    Evaluation(1, {"loss": 2.0}).save(saved)
    job.run(once=True)
    assert job.failed == {}
    assert read_scores(saved) == {1: {"loss": 2.0, "harness/a/acc": 1.0}}
    job.run(once=True)
    assert "nothing is left to score" in said[-1]


def test_a_problem_of_what_was_asked_counts_as_an_answer(saved):
    asked = []

    def score(step):
        asked.append(step)
        return Evaluation(step, {"loss": 1.0}, problems=["harness: no such task"])

    job, _ = watcher(saved, score, labels=("harness",))
    job.run(once=True)
    watcher(saved, score, labels=("harness",))[0].run(once=True)
    assert asked == [1]


def test_what_nobody_can_be_asked_ends_the_job(saved, monkeypatch):
    with pytest.raises(RunError, match="did you mean 'multiple_choice'"):
        evaluate(monkeypatch, saved, "--once", "--config.eval.tasks.0.name=multiple_chose")
    with pytest.raises(ConfigError, match="no checkpoints at"):
        evaluate(monkeypatch, saved / "nowhere", "--once")


def test_nothing_to_measure_ends_the_job(saved):
    job, _ = watcher(saved, lambda step: None)
    with pytest.raises(RunError, match=r"has no held-out documents: see data\.held_out_fraction"):
        job.run(once=True)
    job, _ = watcher(saved, lambda step: Evaluation(step, {}, problems=["no corpus", "no task"]))
    with pytest.raises(RunError, match="no corpus; no task"):
        job.run(once=True)
    assert list((saved / "evals" / "claims").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workdir", "a", "--compare", "a", "b"], "say what to evaluate"),
        ([], "say what to evaluate"),
        (["--workdir", "a", "--takeover_after", "9"], "--takeover_after goes with --watch or"),
        (["--workdir", "a", "--watch", "--step", "3"], "--step goes with one checkpoint"),
        (["--workdir", "a", "--once", "--takeover_after", "0"], "0.0 must be at least 1"),
        (["--workdir", "a", "--batch_size", "-3"], "--batch_size -3 must be at least 1"),
        (["--compare", "a", "b", "--step", "3"], "--compare takes two runs, DIR or DIR@STEP"),
    ],
)
def test_flags_that_do_not_go(flags, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    with pytest.raises(RunError, match=said):
        entry.main()
