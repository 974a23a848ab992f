"""Comparisons of plans: what grew is said, thresholds bite, other commits answer by their own planner."""

import dataclasses
import io
import json
import subprocess

import pytest
from rich.console import Console

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.planner.diff import compare, parse_thresholds, show
from llm_jax.planner.plan import Cost, Exchange, Finding, LiveBuffer, Memory, Op, Plan, Roofline
from llm_jax.planner.revision import other_commit, plan_from_dict

GIB = 2**30


def exchange(tensor, kind="all-gather", direction="forward", sent=1e6, name="all-gather.1"):
    return Exchange(
        name, kind, "fsdp", 2_000_000, sent, 24, 2e-4, 1e-4, tensor, "parameter", direction,
        "llm_jax/nn/mlp.py:59", "jit(step)/jvp(stack)/while/body/layers/mlp/btd,df->btf/dot_general",
    )  # fmt: skip


def plan(**changes):
    buffer = LiveBuffer(
        "activations", GIB, "bf16", (24, 8, 2048, 2048), (24, 512, 2048, 2048), "[-, fsdp, -, -]",
        "stack.layers", "llm_jax/nn/transformer.py:100", "jit(step)", "while.1", "model.remat=full",
        GIB // 2,
    )  # fmt: skip
    op = Op("fusion.1", "matmul", "forward", "jit(step)", "llm_jax/nn/mlp.py:59", "stack.layers.mlp",
            24, 1e12, 1e9, 3e-3, 3e-3, "compute", "compiler")  # fmt: skip
    whole = Plan(
        target="v5p:4x4x4", chip="v5p", num_chips=64, estimated=False,
        config={"model": {"remat": "attention", "num_layers": 24}, "train": {"batch_size": 512}},
        mesh={"data": 1, "fsdp": 64}, num_params=1_370_000_000, tokens_per_step=2**20,
        memory=Memory(95 * GIB, 5 * GIB, {"parameters": GIB, "activations": 4 * GIB}, (buffer,),
                      ((0, GIB), (7, 5 * GIB)), "fusion.1"),
        roofline=Roofline(
            0.3, {"compute": 0.25, "communication fsdp": 0.05}, (op,),
            (exchange("params.stack.layers.mlp.up"), exchange("params.embed")),
            54_000.0, 8e9, 1e10, 0.6, None, 1.0, 0.9,
        ),
        findings=(Finding("note", "a note", seconds=0.01),),
        cost=Cost(2e10, 1.0, 1536.0, 6451.2, 4.2, "list price"),
        versions={"jax": "0.10.2"}, seconds={"compile": 17.0}, host_peak_bytes=GIB,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def slower(base, factor):
    roofline = dataclasses.replace(base.roofline, step_seconds=base.roofline.step_seconds * factor)
    return dataclasses.replace(base, roofline=roofline)


def shown(diff, width=120):
    console = Console(file=io.StringIO(), width=width)
    show(diff, console)
    return console.file.getvalue()


def test_equal_plans_differ_in_nothing():
    diff = compare(plan(), plan())
    assert diff.exchanges == ()
    assert diff.config == ()
    assert diff.exceeds({"memory": 0, "time": 0, "communication": 0}) == []
    assert "the same collectives" in shown(diff)


def test_names_of_the_compiler_are_no_difference():
    renamed = [
        exchange(t, name=f"other.{t}") for t in ("params.stack.layers.mlp.up", "params.embed")
    ]
    roofline = dataclasses.replace(plan().roofline, exchanges=tuple(renamed))
    assert compare(plan(), plan(roofline=roofline)).exchanges == ()


def test_memory_over_its_threshold_is_said_in_one_line():
    memory = dataclasses.replace(plan().memory, peak=int(5.6 * GIB))
    diff = compare(plan(), plan(memory=memory))
    (line,) = diff.exceeds({"memory": 5, "time": 5})
    assert line == "memory +12.0% (peak 5.00 -> 5.60 GiB) is over 5%"
    assert diff.exceeds({"memory": 15}) == []


def test_what_does_not_fit_any_more_exceeds_any_threshold():
    memory = dataclasses.replace(plan().memory, capacity=5 * GIB)
    over = dataclasses.replace(memory, peak=5 * GIB + 1)
    diff = compare(plan(memory=memory), plan(memory=over, roofline=None))
    (line,) = diff.exceeds({"memory": 50, "time": 5, "communication": 5})
    assert "does not fit any more" in line
    assert "old fits, new does not fit" in shown(diff)
    assert "not compared" in shown(diff)


def test_time_and_communication_thresholds():
    more = exchange("params.head", kind="all-reduce", direction="backward", sent=4e6)
    base = plan()
    grown = dataclasses.replace(base.roofline, exchanges=(*base.roofline.exchanges, more))
    diff = compare(base, slower(plan(roofline=grown), 1.1))
    time, communication = diff.exceeds({"time": 5, "communication": 100})
    assert time.startswith("time +10.0% (step 300 ms -> 330 ms) is over 5%")
    assert communication.startswith("communication +200.0% (sent ")
    (added,) = diff.exchanges
    assert (added.kind, added.tensor, added.old) == ("all-reduce", "params.head", None)
    assert added.new.times == 24
    assert added.new.sent_bytes == 96e6
    text = shown(diff)
    assert "params.head" in text
    assert "+10.0%" in text


@pytest.mark.parametrize("width", [80, 150, 200])
def test_a_collective_is_told_whole_on_any_width(width):
    base = plan()
    tensors = ("params.stack.layers.attention.projection_of_the_output", "params.embed")
    one = exchange(tensors[0], kind="reduce-scatter", direction="backward", sent=45.3e6)
    grown = dataclasses.replace(one, axes="data+fsdp", sent_bytes=91.2e6, exposed=2.4e-3)
    before, after = (
        plan(roofline=dataclasses.replace(base.roofline, exchanges=exchanges))
        for exchanges in ((one, exchange(tensors[1])), (grown,))
    )
    names = ("gpt_1b_with_a_long_name", "gpt_1b")
    text = shown(compare(before, after, *names), width)
    assert max(map(len, text.splitlines())) <= width
    for said in (
        "reduce-scatter data+fsdp, backward", "reduce-scatter fsdp, backward", "all-gather fsdp, forward",
        "attention.projection_of_the_output", "params.embed", "24 x, 1.01 GiB, 2.40 ms",
        "24 x, 2.04 GiB, 57.6 ms", "24 x, 22.9 MiB, 2.40 ms", "none", *names,
    ):  # fmt: skip
        assert said in text, said


def test_names_with_brackets_are_text():
    names = ("gpt[/x]", "gpt[bold]")
    memory = dataclasses.replace(plan().memory, capacity=GIB)
    grown = dataclasses.replace(plan().roofline, exchanges=(exchange("params.head[/y]"),))
    for width in (80, 200):
        text = shown(compare(plan(), plan(memory=memory, roofline=grown), *names), width)
        assert "gpt[/x] fits, gpt[bold] does not fit" in " ".join(text.split())
        assert text.count("gpt[bold]") >= 3
        assert "params.head[/y]" in text


def test_communication_where_there_was_none_is_over():
    silent = plan(roofline=dataclasses.replace(plan().roofline, exchanges=()))
    (line,) = compare(silent, plan()).exceeds({"communication": 5})
    assert "+inf%" in line


def test_changed_keys_of_the_config_are_listed():
    config = {"model": {"remat": "full", "num_layers": 24}, "train": {"batch_size": 512}}
    diff = compare(plan(), plan(config=config), "HEAD~1", "HEAD")
    assert diff.config == ("config.model.remat: 'attention' -> 'full'",)
    assert diff.config[0] in shown(diff)
    assert "HEAD~1" in shown(diff)


def test_the_diff_is_json():
    content = json.loads(json.dumps(compare(plan(), slower(plan(), 2)).to_dict()))
    assert content["step"] == {"name": "step", "old": 0.3, "new": 0.6}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("memroy=5", "memory"),
        ("time=fast", "time=5"),
        ("memory", "memory=5"),
        ("memory=nan", "at least 0: memory=5"),
        ("time=inf", "at least 0: time=5"),
        ("communication=-1", "at least 0: communication=5"),
    ],
)
def test_thresholds_that_cannot_be_read(text, named):
    with pytest.raises(ConfigError, match=named):
        parse_thresholds(text)


def test_thresholds():
    assert parse_thresholds("memory=5,time=2.5%") == {"memory": 5.0, "time": 2.5}


def test_a_plan_survives_json():
    assert plan_from_dict(json.loads(json.dumps(plan().to_dict()))) == plan()
    bare = plan(roofline=None, cost=None)
    assert plan_from_dict(json.loads(json.dumps(bare.to_dict()))) == bare
    assert "step" not in bare.to_dict()


def test_plans_of_other_versions():
    content = plan().to_dict() | {"something_new": 1}
    assert plan_from_dict(content) == plan()
    del content["memory"]["peak"]
    with pytest.raises(ConfigError, match="peak"):
        plan_from_dict(content)


@pytest.fixture
def repository(tmp_path):
    """Commits: "bare" without a planner, "planned" with one that answers with a fixed plan."""
    root = tmp_path / "repository"
    (root / "llm_jax").mkdir(parents=True)
    (root / "configs").mkdir()

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    (root / "llm_jax" / "__init__.py").write_text("")
    (root / "configs" / "tiny.py").write_text("BASE = True\n")
    git("add", "-A")
    git("commit", "-qm", "bare")
    git("tag", "bare")
    (root / "plan.json").write_text(json.dumps(plan().to_dict()))
    (root / "llm_jax" / "plan.py").write_text(
        "import json, pathlib, sys\n"
        "flags = dict(zip(sys.argv[1::1], sys.argv[2::1]))\n"
        "content = json.loads(pathlib.Path('plan.json').read_text())\n"
        "content['target'] = flags['--topology']\n"
        "content['config'] = {'file': pathlib.Path(flags['--config']).read_text(), 'argv': sys.argv}\n"
        "pathlib.Path(flags['--json']).write_text(json.dumps([content]))\n"
        "sys.exit('no such chip' if flags['--topology'] == 'v0' else 2)\n"
    )
    git("add", "-A")
    git("commit", "-qm", "planned")
    git("tag", "planned")
    (root / "configs" / "tiny.py").write_text("BASE = False\n")
    return root


def test_a_commit_plans_its_own_config_and_leaves_no_trace(repository):
    found = other_commit(
        "planned", "configs/tiny.py", ["train.batch_size=8"], "v5e:2x2", folder=repository
    )
    assert found.target == "v5e:2x2"
    assert found.config["file"] == "BASE = True\n"
    assert "--config.train.batch_size=8" in found.config["argv"]
    assert found.memory == plan().memory
    status = ["git", "status", "--porcelain"]
    changed = subprocess.run(status, cwd=repository, capture_output=True, text=True, check=True)
    assert changed.stdout.split() == ["M", "configs/tiny.py"]


@pytest.mark.parametrize(
    ("ref", "target", "error", "said"),
    [
        ("bare", "v5e:2x2", ConfigError, "has no planner"),
        ("nowhere", "v5e:2x2", ConfigError, "no commit of"),
        ("--all", "v5e:2x2", ConfigError, "no commit of"),
        ("planned", "v0", RunError, "no such chip"),
    ],
)
def test_commits_that_cannot_be_planned(repository, ref, target, error, said):
    with pytest.raises(error, match=said) as raised:
        other_commit(ref, "configs/tiny.py", [], target, folder=repository)
    assert "\n" not in str(raised.value)


def test_outside_of_a_repository(tmp_path):
    with pytest.raises(ConfigError, match="no git repository"):
        other_commit("main", "configs/tiny.py", [], "v5e:2x2", folder=tmp_path)
