"""The search with a compiler that answers at once, and, slow, with the real one."""

import dataclasses
import math
import random

import pytest

from llm_jax.core.config import ConfigError, load, to_dict
from llm_jax.core.flags import RunError
from llm_jax.planner import search as search_module
from llm_jax.planner.estimate import estimate
from llm_jax.planner.hunt import Hunt
from llm_jax.planner.search import explain, search, write_config
from llm_jax.planner.space import default_targets, meshes, overrides_of
from llm_jax.planner.topology import parse_target
from llm_jax.training.config import resolve

CONFIG = """
def get_config(size="small"):
    import ml_collections
    return ml_collections.ConfigDict({
        "model": {"name": "gpt", "vocab_size": 512, "embed_dim": 256, "num_layers": 4,
                  "num_heads": 4, "mlp_dim": 768, "max_length": 512},
        "data": {"sequence_length": 512, "tokenizer": {"name": "raw_bytes"}},
        "train": {"num_steps": 10, "batch_size": 32},
        "mesh": {"fsdp": -1},
    })
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def run(base):
    return resolve(load(base))


def answers(monkeypatch, change, finals=None):
    """Compiled plans are `change(estimated plan)`; returns the requests that the hunt made.

    The best are asked for once more, without options; those requests are in `finals`.
    """
    asked = []

    def compile_many(requests, jobs=2, cache=None, on_done=None):
        # As they come, in any order.
        for request in random.Random(len(asked)).sample(list(requests), len(requests)):
            if request.options:
                asked.append(request)
            elif finals is not None:
                finals.append(request)
            yield request, request

    def make_plan(request, target, *, tokens=None, price=None):
        plan = change(estimate(resolve(request.config), target, tokens=tokens, price=price))
        return dataclasses.replace(plan, estimated=False)

    monkeypatch.setattr(search_module, "compile_many", compile_many)
    monkeypatch.setattr(search_module, "make_plan", make_plan)
    return asked


def larger(plan, factor):
    memory = dataclasses.replace(plan.memory, peak=int(plan.memory.peak * factor))
    return dataclasses.replace(plan, memory=memory)


def test_the_best_of_all_choices_is_found_where_estimates_are_right(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    result = search(run, ["v5e:2x2"], compiles=4)
    hunt = Hunt("time", None, 4)
    hunt.add(run, parse_target("v5e:2x2"))
    best = hunt.next(1)[0]
    assert result.winner.candidate.overrides == best.overrides
    assert result.winner.fits
    assert not result.winner.plan.estimated
    assert len(asked) <= 4
    assert result.considered == hunt.considered > 100


def test_no_choice_is_compiled_twice_and_the_budget_holds(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: larger(plan, 1.1))
    search(run, ["v5e:2x2", "v5e:2x4", "v6e:2x2"], compiles=7, jobs=3)
    assert len(asked) <= 7
    keys = [(request.target, str(to_dict(request.config))) for request in asked]
    assert len(set(keys)) == len(keys)
    assert {request.target for request in asked} == {"v5e:2x2", "v5e:2x4", "v6e:2x2"}


def test_the_best_are_compiled_as_they_would_train(monkeypatch, run):
    finals = []
    asked = answers(monkeypatch, lambda plan: plan, finals)
    result = search(run, ["v5e:2x2"], compiles=4)
    assert all(request.options == {"xla_tpu_scoped_vmem_limit_kib": "16384"} for request in asked)
    assert len(finals) == 2
    best = [to_dict(trial.candidate.run) for trial in result.trials[:2]]
    assert sorted(map(str, best)) == sorted(str(request.config) for request in finals)
    # Chips for which both ways are the same need no second look.
    finals.clear()
    search(run, ["tpu7x:2x2x1"], compiles=2)
    assert len({str(request.config) for request in finals}) == len(finals) > 0


def test_the_first_half_of_the_compiles_are_different_meshes(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    search(run, ["v5e:2x4"], compiles=8, jobs=2)
    assert len(asked) >= 2
    first = [str(request.config["mesh"]) for request in asked[:4]]
    assert len(set(first)) == len(first)


def test_answers_that_do_not_fit_correct_the_estimates(monkeypatch):
    run = resolve(load("configs/gpt_1b.py", ["train.batch_size=64"]))
    asked = answers(monkeypatch, lambda plan: larger(plan, 1.8))
    result = search(run, ["v5e:4x4"], compiles=6, jobs=1)
    assert result.winner is not None
    assert result.winner.plan.memory.peak <= result.winner.plan.memory.capacity
    assert not result.trials[-1].fits
    # After the first answer, no other that is as large relative to its estimate is tried.
    assert sum(not trial.fits for trial in result.trials) <= 2
    assert len(asked) <= 6
    assert any("more memory than there is" in line for line in explain(result))


def test_what_does_not_fit_anywhere_is_said(monkeypatch):
    asked = answers(monkeypatch, lambda plan: plan)
    run = resolve(load("configs/llama3_8b.py", ["train.batch_size=4", "train.accumulate_steps=1"]))
    result = search(run, ["v5e:2x2"], compiles=3)
    assert not asked
    assert result.winner is None
    assert result.pruned["memory"] > 0
    lines = explain(result)
    assert any("v5e:2x2: nothing fits; the smallest choice needs about" in line for line in lines)


def test_cost_prefers_few_chips_and_time_prefers_many(monkeypatch, run):
    answers(monkeypatch, lambda plan: plan)
    targets = ["v5e:2x2", "v5e:2x4"]
    by_time = search(run, targets, objective="time", compiles=4)
    by_cost = search(run, targets, objective="cost", compiles=4)
    assert by_time.winner.candidate.target.name == "v5e:2x4"
    assert by_cost.winner.candidate.target.name == "v5e:2x2"
    assert [by_cost.score(t) for t in by_cost.trials if t.fits] == sorted(
        by_cost.score(t) for t in by_cost.trials if t.fits
    )


def test_why_the_next_best_loses(monkeypatch):
    run = resolve(load("configs/gpt_1b.py", ["train.batch_size=64"]))

    def change(plan):
        if plan.mesh["fsdp"] == 16:
            return plan
        slower = dict(plan.roofline.bounds)
        slower["communication tensor"] = slower.get("communication tensor", 0) + 0.05
        roofline = dataclasses.replace(
            plan.roofline, bounds=slower, step_seconds=sum(slower.values())
        )
        return dataclasses.replace(plan, roofline=roofline)

    answers(monkeypatch, change)
    result = search(run, ["v6e:4x4"], compiles=6)
    assert all(trial.candidate.run.mesh.fsdp == 16 for trial in result.trials[:2])
    lines = "\n".join(explain(result))
    assert "best: v6e:4x4: fsdp 16" in lines
    assert "next: v6e:4x4 with fsdp 16" in lines
    assert "the best of another mesh: v6e:4x4 with " in lines
    assert "ms more on communication tensor" in lines


def test_ctrl_c_keeps_what_is_there(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    compile_many = search_module.compile_many

    def interrupted(requests, jobs=2, cache=None, on_done=None):
        if asked:
            raise KeyboardInterrupt
        yield from compile_many(requests, jobs, cache)

    monkeypatch.setattr(search_module, "compile_many", interrupted)
    result = search(run, ["v5e:2x2", "v5e:2x4"], compiles=8, jobs=1)
    assert result.interrupted
    assert len(result.trials) == 1
    assert result.winner is not None
    assert "interrupted" in explain(result)[0]


def test_a_compiler_that_crashes_is_a_line_of_the_table(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    compile_many = search_module.compile_many

    def crashing(requests, jobs=2, cache=None, on_done=None):
        for request, answer in compile_many(requests, jobs, cache):
            yield request, RunError("the compiler crashed") if len(asked) == 1 else answer

    monkeypatch.setattr(search_module, "compile_many", crashing)
    result = search(run, ["v5e:2x2"], compiles=3, jobs=1)
    assert result.winner is not None
    assert result.trials[-1].plan is None
    assert result.trials[-1].why == "the compiler crashed"


def test_gpus_are_estimated_and_never_compiled(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    result = search(run, ["h100-8", "v5e:2x2"], compiles=3)
    assert {request.target for request in asked} == {"v5e:2x2"}
    estimated = [trial for trial in result.trials if trial.plan.estimated]
    assert [trial.candidate.target.name for trial in estimated] == ["h100-8"]
    assert estimated[0].why == "estimated"
    only = search(run, ["h100-8"], compiles=3)
    assert only.winner.plan.estimated


def test_every_mesh_multiplies_to_the_devices_and_keeps_its_overrides():
    run = resolve(load("configs/moe_7b.py"))
    for name in ("v5e:4x4", "2xv5e:4x4", "tpu7x:2x2x2"):
        target = parse_target(name)
        count = target.num_chips * target.devices_per_chip
        seen = set()
        for mesh in meshes(run, target):
            shape = mesh.shape(count, target.num_slices)
            across = mesh.slices(target.num_slices)
            assert count == math.prod(shape.values()) * math.prod(across.values())
            assert mesh not in seen
            seen.add(mesh)
        assert any(mesh.expert > 1 for mesh in seen)


@pytest.mark.parametrize("argument", ["", ":large"])
def test_the_written_config_is_the_chosen_one(monkeypatch, base, run, tmp_path, argument):
    answers(monkeypatch, lambda plan: plan)
    run = resolve(load(base, ["train.num_steps=77"]))
    winner = search(run, ["v5e:2x4"], compiles=2, tokens=1e9).winner
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "chosen.py"
    # A base with slices of its own does not get in the way.
    also = ["train.num_steps=77", "mesh.dcn.fsdp=2"]
    write_config(path, base + argument, winner, also=also)
    written = resolve(load(str(path)))
    assert to_dict(written) == to_dict(winner.candidate.run)
    assert overrides_of(written) == winner.candidate.overrides
    assert written.train.num_steps == 77
    text = path.read_text()
    assert "Command:  python -m llm_jax.train --config" in text
    assert "v5e:2x4, 8 chips" in text
    assert " for 1.00 B tokens" in text


def test_a_config_is_written_only_where_it_can_be(tmp_path, monkeypatch, base, run):
    answers(monkeypatch, lambda plan: plan)
    winner = search(run, ["v5e:2x2"], compiles=1).winner
    for path in (tmp_path / "no_folder" / "a.py", tmp_path / "a.txt"):
        with pytest.raises(ConfigError, match=r"expected a \.py file in a folder that exists"):
            write_config(path, base, winner)


def test_bad_targets_are_refused_at_once(run):
    with pytest.raises(ConfigError, match="v7x"):
        search(run, ["v7x-16"])
    with pytest.raises(ConfigError, match="a search needs names of slices"):
        search(run, ["local"])
    with pytest.raises(ConfigError, match="no price is known"):
        search(run, ["tpu7x-4"], objective="cost")


def test_default_targets_parse_and_stay_below_the_limit():
    names = default_targets(64)
    assert "v5e-16" in names
    assert "v5p-64" in names
    for name in names:
        assert parse_target(name).num_chips <= 64


@pytest.mark.slow
def test_the_real_compiler_confirms_the_winner(base, run, tmp_path):
    result = search(run, ["v5e:2x2"], compiles=3, jobs=2, cache=tmp_path / "cache")
    assert len(result.trials) == 3 or result.winner is not None
    winner = result.winner
    assert winner.plan.memory.fits
    assert not winner.plan.estimated
    assert winner.plan.roofline.step_seconds > 0
    path = tmp_path / "chosen.py"
    write_config(path, base, winner)
    assert overrides_of(resolve(load(str(path)))) == winner.candidate.overrides
