"""The command as a user types it: answers, files, exit statuses, one-line errors, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_plans
import pytest

from bench import plans
from llm_jax.core.config import ConfigError, load
from llm_jax.data.progress import Silent
from llm_jax.planner import answer as answers
from llm_jax.planner import targets
from llm_jax.planner.answer import Question, answer
from llm_jax.planner.hunt import Candidate, Trial
from llm_jax.planner.search import SearchResult
from llm_jax.planner.targets import Answers
from llm_jax.planner.topology import parse_target
from llm_jax.training.config import resolve

PLAN = ["-m", "llm_jax.plan", "--config", "configs/gpt_tiny.py"]


@pytest.fixture
def planned(monkeypatch):
    """Answers every question with the given plans."""

    def set_answers(plans, failures=None, interrupted=False):
        found = Answers(tuple(plans), failures or {}, interrupted)
        monkeypatch.setattr(answers, "plan_targets", lambda *args, **kwargs: found)

    return set_answers


def question(*topology, **asked) -> Question:
    known = {"config": "configs/gpt_tiny.py", "max_chips": 4, "compiles": 2, "jobs": 1}
    return Question(topology=topology, **{**known, **asked})


@pytest.fixture
def searched(monkeypatch):
    """Every search ends with these trials: (plan, or why there is none)."""

    def set_trials(*answers_, interrupted=False, objective="time"):
        candidate = Candidate(parse_target("v5e:2x2"), resolve(load("configs/gpt_tiny.py")), 1, 1.0)
        trials = tuple(
            Trial(candidate, None, answer) if isinstance(answer, str) else Trial(candidate, answer)
            for answer in answers_
        )
        found = SearchResult(objective, trials, 100, {}, (), None, 1.0, interrupted)
        monkeypatch.setattr(answers.search, "search", lambda *args, **kwargs: found)

    return set_trials


def test_help_is_fast_and_says_the_statuses(run_python):
    imported = "import sys, llm_jax.plan as p; p.make_parser(); print('jax' in sys.modules, 'rich' in sys.modules)"
    assert run_python("-c", imported).stdout.split() == ["False", "False"]
    start = time.perf_counter()
    result = run_python("-m", "llm_jax.plan", "--help")
    assert time.perf_counter() - start < 5  # 0.2 s on a machine with nothing else to do
    text = " ".join(result.stdout.split())
    assert "2 if it does not" in text
    assert "--workdir" not in text
    assert "--data" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name a --topology, such as v5p:4x4x4 or local, or use --search"),
        (["--topology", "v5q-16"], "'v5q-16': "),
        (["--topology", "h100-8", "--config.mesh.fsdp=3"], "mesh fsdp 3 does not divide over 8 devices: the nearest"),
        (["--topology", "h100-8", "--config.model.remta=full"], "did you mean 'remat'"),
        (["--topology", "h100-8", "--tokens", "many"], "tokens 'many': expected"),
        (["--topology", "h100-8", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--topology", "h100-8", "--jobs", "two"], "--jobs: invalid int value: 'two'"),
        (["--topology", "h100-8", "--rank", "speed"], "invalid choice: 'speed'"),
        (["--topology", "h100-8", "--html", "/nowhere/at/all/x.html"], "there is no folder /nowhere/at/all"),
        (["--topology", "h100-8", "--html", "/"], "--html /: it is a folder"),
        (["--topology", "h100-8", "--price", "2"], "--price needs --tokens"),
        (["--search", "--price", "2"], "--price needs --tokens, or --search --rank cost"),
        (["--search", "--write_config", "configs/gpt_1b.py"], "configs/gpt_1b.py: it exists and no search wrote it"),
        (["--topology", "h100-8", "--tokens", "1b", "--price", "-1"], "price -1.0: expected dollars"),
        (["--search", "--write_config", "configs/gpt_tiny.py"], "it is the config to begin with"),
        (["--topology", "h100-8", "--write_config", "x.py"], "--write_config needs --search"),
        (["--search", "--write_config", "x.yaml"], "x.yaml: expected a .py file"),
        (["--topology", "h100-8,v5e-4", "--compare", "HEAD"], "--compare needs one --topology"),
        (["--topology", "h100-8", "--max_increase", "memory=5"], "--max_increase needs --compare"),
        (["--topolgy", "h100-8"], "unknown flag '--topolgy'; did you mean '--topology'?"),
    ],
)  # fmt: skip
def test_errors_are_one_line(run_python, flags, message):
    result = run_python(*PLAN, *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not result.stdout


def test_an_estimate_from_the_command(run_python, tmp_path):
    page, figures = tmp_path / "plan.html", tmp_path / "plan.json"
    more = ["--tokens", "1b", "--price", "2.5", "--html", page, "--json", figures]
    result = run_python(*PLAN, "--topology", "h100-8", *more)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ESTIMATE")
    assert "$2.5 per chip-hour" in result.stdout
    assert "Estimate: " in page.read_text()
    content = json.loads(figures.read_text())
    assert content["target"] == "h100-8"
    assert content["estimated"] is True
    assert content["cost"]["tokens"] == 1e9


def test_json_on_standard_output_is_all_there_is_on_it(run_python):
    result = run_python(*PLAN, "--topology", "h100-1, h100-2", "--json", "-")
    assert result.returncode == 0, result.stderr
    plans = json.loads(result.stdout)["plans"]
    assert [plan["num_chips"] for plan in plans] == [1, 2]
    assert "h100-2" in result.stderr  # the table


def test_the_status_says_whether_it_fits(planned, capsys):
    planned([fake_plans.too_large()])
    assert answer(question("v5e:4x4")) == 2
    assert "does not fit" in capsys.readouterr().out
    planned([fake_plans.too_large(), fake_plans.plan()])
    assert answer(question("v5e:4x4", "v5p:4x4x4")) == 0
    planned([fake_plans.too_large(), fake_plans.too_large()])
    assert answer(question("v5e:4x4", "v5e:2x2")) == 2


def test_a_target_that_fails_does_not_take_the_others_along(planned, capsys):
    planned([fake_plans.plan()], {"v5e:4x4": ConfigError("it cannot be sharded")})
    assert answer(question("v5e:4x4", "v5p:4x4x4")) == 1
    said = capsys.readouterr()
    assert "v5p:4x4x4" in said.out
    assert said.err == "error: v5e:4x4: it cannot be sharded\n"
    planned([], {"v5e:4x4": ConfigError("it cannot be sharded")})
    with pytest.raises(ConfigError, match="cannot be sharded"):
        answer(question("v5e:4x4"))


def test_what_was_there_before_ctrl_c_is_shown_and_written(planned, capsys, tmp_path):
    planned([fake_plans.plan()], interrupted=True)
    asked = question(
        "v5p:4x4x4", "v5e:4x4", html=tmp_path / "a.html", json=str(tmp_path / "a.json")
    )
    assert answer(asked) == 130
    assert "v5p:4x4x4" in capsys.readouterr().out
    assert (tmp_path / "a.html").exists()
    assert len(json.loads((tmp_path / "a.json").read_text())["plans"]) == 1
    planned([], interrupted=True)
    for names in (["v5p:4x4x4"], ["v5p:4x4x4", "v5e:4x4"]):  # the answer of before stays
        assert answer(question(*names, json=str(tmp_path / "a.json"))) == 130
        assert len(json.loads((tmp_path / "a.json").read_text())["plans"]) == 1


def test_ctrl_c_before_there_is_a_run(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "load", stopped)
    assert answer(question("v5p:4x4x4")) == 130


def test_a_search_in_which_all_failed_is_an_error(searched, capsys, tmp_path):
    searched("the compiler crashed", "it crashed again")
    path, figures = tmp_path / "best.py", tmp_path / "a.json"
    asked = question("v5e:2x2", search=True, write_config=path, json=str(figures))
    assert answer(asked) == 1
    said = capsys.readouterr()
    assert "the compiler crashed" in said.out
    assert "it crashed again" in said.out
    assert (
        said.err
        == f"error: --write_config {path}: nothing to write, no choice that was tried fits\n"
    )
    assert not path.exists()
    assert any("it crashed again" in line for line in json.loads(figures.read_text())["reasons"])
    searched("the compiler crashed", fake_plans.too_large())
    assert answer(asked) == 2
    searched(fake_plans.plan(), "the compiler crashed")
    assert answer(asked) == 0
    assert "as a search would train it on" in path.read_text()
    searched()
    assert answer(question("v5e:2x2", search=True)) == 2


def test_an_interrupted_search_without_an_answer_leaves_the_one_before(searched, tmp_path):
    figures = tmp_path / "a.json"
    figures.write_text("{}")
    searched(interrupted=True)
    assert answer(question("v5e:2x2", search=True, json=str(figures))) == 130
    assert figures.read_text() == "{}"
    searched(fake_plans.plan(), interrupted=True)
    assert answer(question("v5e:2x2", search=True, json=str(figures))) == 130
    assert len(json.loads(figures.read_text())["plans"]) == 1


def test_a_file_that_no_search_wrote_is_told_before_the_search(monkeypatch, tmp_path):
    monkeypatch.setattr(answers.search, "search", lambda *args, **kwargs: pytest.fail("it began"))
    own = tmp_path / "own.py"
    own.write_text("BATCH = 8\n")
    with pytest.raises(ConfigError, match="it exists and no search wrote it"):
        answer(question("v5e:2x2", search=True, write_config=own))
    assert own.read_text() == "BATCH = 8\n"


def test_plans_come_in_the_order_asked_for(monkeypatch):
    """Whatever order compilations end in; an interruption keeps those that did."""

    class Step:
        def __init__(self, target):
            self.target = target

    def compile_many(requests, jobs, cache):
        for request in reversed(requests):
            yield request, Step(request.target)
        raise KeyboardInterrupt

    monkeypatch.setattr(targets, "compile_many", compile_many)
    monkeypatch.setattr(
        targets, "make_plan", lambda step, *_, **__: fake_plans.plan(target=step.target)
    )
    monkeypatch.setattr(targets, "to_dict", lambda run: {})
    names = ["v5e:2x2", "v5p:2x2x2", "v6e:2x2"]
    found = targets.plan_targets(None, names, jobs=1, cache=None, progress=Silent())
    assert [plan.target for plan in found.plans] == names
    assert found.interrupted
    assert not found.failures


def test_compare_fails_over_its_thresholds(monkeypatch, capsys, tmp_path):
    small = fake_plans.plan()
    made = iter([small, fake_plans.too_large()])
    monkeypatch.setattr(answers, "plan_targets", lambda *a, **k: Answers((next(made),), {}, False))
    asked = question("v5p:4x4x4", compare="configs/gpt_1b.py", max_increase="memory=5")
    assert answer(asked) == 1
    assert "error: memory" in capsys.readouterr().err
    made = iter([small, small])
    assert answer(asked) == 0
    with pytest.raises(ConfigError, match="no commit"):
        answer(question("v5p:4x4x4", compare="no_such_thing"))


def test_configs_of_one_name_are_told_apart(planned, capsys, tmp_path):
    other = tmp_path / "gpt_tiny.py"
    shutil.copy("configs/gpt_tiny.py", other)
    small, large = (f"configs/gpt_tiny.py{argument}" for argument in ("", ":large"))
    cases = {
        (str(other), small): [str(other), small],
        (small, small): ["as it is", "with these flags"],
        (f"./{small}", small): ["as it is", "with these flags"],
        (small, large): [small, large],
        ("configs/gpt_1b.py", large): ["gpt_1b", "gpt_tiny"],
    }
    for (old, new), names in cases.items():
        assert answers._names(old, new) == names
    planned([fake_plans.plan()])
    assert answer(question("v5p:4x4x4", compare=str(other))) == 0
    assert "with these flags" not in capsys.readouterr().out


def test_the_table_of_the_docs_is_what_its_command_prints():
    docs = Path("docs/planner.md").read_text().splitlines()
    head, line, *rows = plans.table_of([{"config": "gpt_1b", "chips": "64", "fits": "yes"}])
    assert docs[docs.index(head) + 1] == line
    assert [len(row.split("|")) for row in rows] == [len(head.split("|"))]
    assert docs[docs.index(head) + 2].startswith("| gpt_1b | 26b |")


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_of_the_command(ended_by, tmp_path):
    """While it compiles, which 48 layers make long; the compiler goes with it."""
    deep = ["--config.model.num_layers=48", "--config.model.scan_unroll=48"]
    process = subprocess.Popen(
        [sys.executable, *PLAN, *deep, "--topology", "local", "--cache", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ),
        # A script that starts the tests in the background makes them ignore it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".compiling-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(ended_by)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert not list(tmp_path.glob(".compiling-*"))


@pytest.mark.slow
def test_local_devices(run_python, tmp_path):
    tiny = [
        "--config.model.num_layers=1",
        "--config.model.embed_dim=64",
        "--config.data.sequence_length=64",
    ]
    result = run_python(*PLAN, *tiny, "--topology", "local", "--cache", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "fits: " in result.stdout
    assert "params.embed" in result.stdout or "logits" in result.stdout
