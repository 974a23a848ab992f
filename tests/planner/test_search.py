"""The search with a compiler that answers at once, and, slow, with the real one."""

import dataclasses
import math
import random

import pytest

from llm_jax.core.config import ConfigError, load, to_dict
from llm_jax.core.flags import RunError
from llm_jax.planner import search as search_module
from llm_jax.planner import words
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


def answers(monkeypatch, change, finals=None, confirm=lambda plan: plan):
    """Compiled plans are `change(estimated plan)`; returns the requests that the hunt made.

    The best are asked for once more, without options; those requests are in `finals`, and their plans
    are `confirm(change(estimated plan))`.
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
        plan = plan if request.options else confirm(plan)
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


def test_what_misses_memory_is_tried_with_more_microbatches(monkeypatch):
    run = resolve(load("configs/llama3_8b.py", ["train.batch_size=64"]))

    def more_activations(plan):
        parts = dict(plan.memory.parts)
        parts["activations"] = int(1.6 * parts["activations"])
        memory = dataclasses.replace(plan.memory, parts=parts, peak=sum(parts.values()))
        return dataclasses.replace(plan, memory=memory)

    answers(monkeypatch, more_activations)
    result = search(run, ["v6e:2x4"], compiles=8)
    winner = result.winner.candidate
    assert winner.summary == "fsdp 8, remat offload, accumulate 2"
    missed = [trial.candidate.summary for trial in result.trials if not trial.fits]
    assert "fsdp 8, remat offload" in missed


def test_choices_run_out_before_the_budget_does(monkeypatch, run):
    """One device has one mesh."""
    asked = answers(monkeypatch, lambda plan: plan)
    search(run, ["v5e-1"], compiles=3)
    assert len(asked) == 3


@pytest.mark.parametrize(("factor", "fits"), [(0.8, True), (1.0, False)])
def test_what_is_estimated_a_little_over_the_memory_is_compiled(monkeypatch, factor, fits):
    run = resolve(load("configs/llama3_8b.py", ["train.batch_size=8", "train.accumulate_steps=1"]))
    asked = answers(monkeypatch, lambda plan: larger(plan, factor))
    result = search(run, ["v6e:2x2"], compiles=3)
    assert len(asked) == 3
    assert (result.winner is not None) == fits
    assert not result.without
    smallest = min(trial.candidate.peak for trial in result.trials)
    assert smallest > result.trials[0].candidate.target.chip.hbm_bytes
    # Named beside a slice where much fits, it has its turn too.
    both = search(run, ["v6e:2x2", "v6e:2x4"], compiles=6)
    assert {trial.candidate.target.name for trial in both.trials} == {"v6e:2x2", "v6e:2x4"}


def test_a_strategy_that_is_far_too_large_does_not_end_the_search(monkeypatch):
    run = resolve(load("configs/gpt_1b.py", ["train.batch_size=64"]))
    plain = lambda plan: plan.mesh["tensor"] == plan.mesh["context"] == plan.mesh["pipeline"] == 1  # noqa: E731
    answers(monkeypatch, lambda plan: larger(plan, 20 if plain(plan) else 1))
    result = search(run, ["v5e:4x4"], compiles=6, jobs=1)
    assert not plain(result.winner.plan)
    assert any(plain(trial.plan) and not trial.fits for trial in result.trials)


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
    assert by_time.winner.plan.cost is None


def test_a_ranking_by_cost_says_the_cost(monkeypatch, run):
    answers(monkeypatch, lambda plan: plan)
    result = search(run, ["v5e:2x2", "v5e:2x4"], objective="cost", compiles=4)
    costs = [trial.plan.cost for trial in result.trials if trial.fits]
    assert {cost.tokens for cost in costs} == {1e9}
    assert [cost.dollars for cost in costs] == sorted(cost.dollars for cost in costs)
    steps = 1e9 / result.winner.plan.tokens_per_step
    assert costs[0].dollars == pytest.approx(steps * result.score(result.winner))
    said = f"are those of 1.00 B tokens: {words.money(costs[0].dollars)}, "
    assert any(said in line for line in explain(result))
    free = search(run, ["v5e:2x2"], objective="cost", compiles=1, price=0.0)
    assert any(line.endswith("chip-hours with the best") for line in explain(free))
    given = search(run, ["v5e:2x2"], objective="cost", compiles=1, tokens=2e10)
    assert given.winner.plan.cost.tokens == 2e10


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


def scaled(plan, factor):
    """All that a step spends, times a factor."""
    bounds = {name: seconds * factor for name, seconds in plan.roofline.bounds.items()}
    step = sum(bounds.values())
    return dataclasses.replace(
        plan, roofline=dataclasses.replace(plan.roofline, bounds=bounds, step_seconds=step)
    )


def test_a_small_difference_is_no_contradiction(monkeypatch, run):
    """Estimates of one mesh whose steps differ by less than is told of any bound."""
    answers(monkeypatch, lambda plan: plan)
    result = search(run, ["v5e:2x4"], compiles=2)
    winner = result.winner
    for factor, said in ((1.002, "a little more on everything"), (1.0, "no slower")):
        near = dataclasses.replace(winner, plan=scaled(winner.plan, factor))
        lines = explain(dataclasses.replace(result, trials=(winner, near)))
        assert sum(said in line for line in lines) == 1
    assert not any("a little more" in line for line in lines)


def test_finalists_that_do_not_fit_make_room_for_the_next(monkeypatch, run):
    finals = []
    confirm = lambda plan: larger(plan, 1e6) if len(finals) < 3 else plan  # noqa: E731
    answers(monkeypatch, lambda plan: plan, finals, confirm)
    result = search(run, ["v5e:2x4"], compiles=6)
    assert not any(trial.quick for trial in result.trials[:2])
    assert all(trial.fits for trial in result.trials[:2])
    assert 3 < len(finals) <= 6
    assert len({str(request.config) for request in finals}) == len(finals)
    quick = sum(trial.quick for trial in result.trials)
    assert quick == 6 - len(finals)


@pytest.mark.parametrize("stopped", [True, False])
def test_how_many_compiled_quickly_is_counted(monkeypatch, run, stopped):
    finals = []
    answers(monkeypatch, lambda plan: plan, finals)
    compile_many = search_module.compile_many

    def stops(requests, jobs=2, cache=None, on_done=None):
        if stopped and not requests[0].options:
            raise KeyboardInterrupt
        yield from compile_many(requests, jobs, cache)

    monkeypatch.setattr(search_module, "compile_many", stops)
    result = search(run, ["v5e:2x4"], compiles=4)
    assert result.interrupted == stopped
    assert f"{4 if stopped else 2} of those tried compiled quickly" in explain(result)[0]


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

    def impatient(*_):
        raise KeyboardInterrupt

    asked.clear()
    monkeypatch.setattr(Hunt, "settle", impatient)
    again = search(run, ["v5e:2x2", "h100-8"], compiles=8, jobs=1)
    assert again.interrupted
    assert again.winner is not None


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
    (failed,) = [line for line in explain(result) if line.startswith("failed: ")]
    assert failed.startswith("failed: v5e:2x2: ")
    assert failed.endswith(": the compiler crashed")


def test_gpus_are_estimated_and_never_compiled(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    result = search(run, ["h100-8", "v5e:2x2"], compiles=3)
    assert {request.target for request in asked} == {"v5e:2x2"}
    estimated = [trial for trial in result.trials if trial.plan.estimated]
    assert [trial.candidate.target.name for trial in estimated] == ["h100-8"]
    assert estimated[0].why == "estimated"
    only = search(run, ["h100-8"], compiles=3)
    assert only.winner.plan.estimated


def test_each_gpu_slice_has_an_estimate_or_a_reason(run):
    result = search(run, ["h100-4", "h100-1", "h100-16"], compiles=1)
    assert [t.candidate.target.name for t in result.trials] == ["h100-16", "h100-4", "h100-1"]
    assert not result.without
    large = resolve(
        load("configs/llama3_8b.py", ["train.batch_size=8", "train.accumulate_steps=1"])
    )
    # The estimates of two lie between once and 1.25 times the memory.
    result = search(large, ["h100-2", "h100-4"], compiles=3)
    assert [trial.candidate.target.name for trial in result.trials] == ["h100-4"]
    assert [line.partition(";")[0] for line in result.without] == ["h100-2: nothing fits"]


def test_an_attention_kernel_that_cannot_run_somewhere_is_no_end(base):
    longer = ["data.sequence_length=4096", "model.max_length=4096"]
    run = resolve(load(base, [*longer, "train.attention_kernel=cudnn"]))
    result = search(run, ["h100-8"], compiles=1)
    assert result.pruned["cannot be sharded"] > 0
    assert result.winner.candidate.run.mesh.context == 1
    run = resolve(load(base, ["train.attention_kernel=splash"]))
    (line,) = search(run, ["h100-8"], compiles=1).without
    assert "nothing can be sharded over its 8 chips: attention kernel 'splash' needs a TPU" in line


def test_two_names_of_a_slice_are_one(monkeypatch, run):
    asked = answers(monkeypatch, lambda plan: plan)
    names = ["v5e-4", "v5e:2x2", "v5e:2x2/mesh", "v5e:2x2/torus", "h100-16", "2xh100-8"]
    result = search(run, names, compiles=6)
    assert {request.target for request in asked} == {"v5e-4", "v5e:2x2/torus"}
    estimated = [trial.candidate.target.name for trial in result.trials if trial.plan.estimated]
    assert estimated == ["h100-16"]


@pytest.mark.parametrize(
    ("mesh", "target", "own"),
    [
        (["mesh.fsdp=4", "mesh.tensor=16"], "v5p:4x4x4", {"fsdp": 4, "tensor": 16}),
        (["mesh.fsdp=-1", "mesh.rules=sequence"], "v5p:4x4x4", {"fsdp": 64, "rules": "sequence"}),
        (["mesh.fsdp=-1", "mesh.dcn.fsdp=-1"], "2xv5e:4x4", {"fsdp": 16}),
    ],
)
def test_the_mesh_of_the_config_is_among_the_choices(mesh, target, own):
    run = resolve(load("configs/gpt_1b.py", mesh))
    found = list(meshes(run, parse_target(target)))
    assert len(set(found)) == len(found)
    assert all(getattr(found[0], name) == value for name, value in own.items())
    assert any(mesh.tensor == 1 for mesh in found)
    elsewhere = resolve(load("configs/gpt_1b.py", ["mesh.fsdp=4", "mesh.tensor=16"]))
    assert all(mesh.tensor <= 8 for mesh in meshes(elsewhere, parse_target("v5e:4x4")))


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


@pytest.mark.parametrize("argument", ["", ":large", ":{path}", ':a"b\\'])
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
    path = tmp_path / "chosen.py"
    for _ in range(2):  # what a search wrote, the next one replaces
        write_config(path, base, winner)
    own = tmp_path / "own.py"
    own.write_text('"""A config of mine."""\n')
    with pytest.raises(ConfigError, match="it exists and no search wrote it"):
        write_config(own, base, winner)
    assert own.read_text() == '"""A config of mine."""\n'


def test_bad_targets_are_refused_at_once(run):
    with pytest.raises(ConfigError, match="v9x"):
        search(run, ["v9x-16"], compiles=1)
    with pytest.raises(ConfigError, match="a search needs names of slices"):
        search(run, ["local"], compiles=1)
    with pytest.raises(ConfigError, match="no price is known"):
        search(run, ["tpu7x-4"], objective="cost", compiles=1)


def test_default_targets_parse_and_stay_below_the_limit():
    names = default_targets(64)
    assert "v5e-16" in names
    assert "v5p-64" in names
    for name in names:
        assert parse_target(name).num_chips <= 64


@pytest.mark.slow
def test_the_real_compiler_confirms_the_winner(base, run, tmp_path):
    result = search(run, ["v5e:2x2"], compiles=3, jobs=2, cache=tmp_path / "cache")
    assert len(result.trials) == 3
    winner = result.winner
    assert not winner.quick
    assert winner.plan.memory.fits
    assert not winner.plan.estimated
    assert winner.plan.roofline.step_seconds > 0
    path = tmp_path / "chosen.py"
    write_config(path, base, winner)
    assert overrides_of(resolve(load(str(path)))) == winner.candidate.overrides
