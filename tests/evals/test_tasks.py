"""Evaluators by config: from JSON lines to figures with their items, at the end and on the way."""

import json

import jax
import pytest
from tiny import make_model, run_config

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals.evaluation import Evaluation, ask, make_tasks, run_tasks
from llm_jax.evals.subject import Subject
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules

TOKENIZER = raw_bytes.make(raw_bytes.Config())
RECORDS = {
    "choices": [
        {"context": "a b c", "choices": [" d", " zzz"], "answer": 0},
        {"context": "x", "choices": [" y", " z", ""], "answer": 1},
    ],
    "pairs": [{"stereotype": "one", "other": "two", "group": "numbers"}],
    "prompts": [{"text": "a b c", "references": ["d"]}],
    "problems": [{"prompt": "x = 1\n", "tests": "assert x == 1"}],
    "texts": [{"text": "abc", "label": "early"}, {"text": "xyz", "label": "late"}],
}


@pytest.fixture
def files(tmp_path):
    for name, records in RECORDS.items():
        lines = "\n".join(map(json.dumps, records)) + "\n\n"
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "text.txt").write_text("some text")
    return {name: str(tmp_path / f"{name}.jsonl") for name in RECORDS} | {
        "text": str(tmp_path / "text.txt")
    }


def sections(files):
    short = {"temperature": 0.0, "max_tokens": 4}
    return [
        {"name": "multiple_choice", "path": files["choices"], "label": "letters"},
        {"name": "bias", "path": files["pairs"]},
        {"name": "generation", "path": files["prompts"], "sampling": short},
        {"name": "code", "path": files["problems"], "sampling": short},
        {"name": "linear_probe", "train": files["texts"], "test": files["texts"]},
        {"name": "perplexity", "domains": {"prose": files["text"]}},
    ]


@pytest.fixture(scope="module")
def subject():
    rules = AxisRules(make_mesh(MeshConfig(), jax.devices()[:1]))
    return Subject(make_model(vocab_size=264, max_length=64), TOKENIZER, rules)


def test_every_evaluator_by_config(files, subject, tmp_path):
    pytest.importorskip("sacrebleu")
    evaluation = Evaluation(3, {})
    run_tasks(make_tasks(sections(files)), subject, evaluation)
    assert evaluation.problems == []
    names = {
        "letters/accuracy", "letters/accuracy_per_byte", "bias/stereotype/numbers", "bias/gap",
        "generation/exact_match", "generation/bleu", "code/pass@1", "linear_probe/layer/1",
        "perplexity/bits_per_byte",
    }  # fmt: skip
    assert names <= evaluation.summary.keys()
    for name, items in evaluation.items.items():
        assert items.mean == pytest.approx(evaluation.summary[name], abs=1e-9)
        assert len(set(items.names)) == len(items.names) == len(items.sums) == len(items.weights)
    assert Evaluation.load(evaluation.save(tmp_path)) == evaluation


def test_on_the_way_it_is_the_same(files, subject):
    run = run_config(
        model={"vocab_size": 264, "max_length": 64}, data={"tokenizer": {"name": "raw_bytes"}}
    )
    tasks, said = make_tasks(sections(files)[:2]), []
    evaluation = Evaluation(3, {})
    run_tasks(tasks, subject, evaluation)
    found = ask(tasks, 3, subject.model, TOKENIZER, run, subject.rules, said.append)
    assert found == pytest.approx(evaluation.summary)
    assert said == []


def test_one_that_cannot_be_asked_leaves_the_others(files, subject):
    class Broken:
        def run(self, subject):
            raise ConfigError("no engine")

    tasks = {"broken": Broken()} | make_tasks(sections(files)[:1])
    evaluation = Evaluation(1, {})
    run_tasks(tasks, subject, evaluation)
    assert evaluation.problems == ["broken: no engine"]
    assert "letters/accuracy" in evaluation.summary


BAD = [
    ([{"path": "x"}], r"config\.eval\.tasks\.0\.name is missing"),
    ([{"name": "multiple_chose", "path": "x"}], "did you mean 'multiple_choice'"),
    ([{"name": "bias"}], r"config\.eval\.tasks\.0\.path is missing"),
    ([{"name": "bias", "path": "nowhere.jsonl"}], r"there is no file nowhere\.jsonl of Pairs"),
    ([{"name": "harness", "tasks": []}], r"harness\.tasks is empty"),
]


@pytest.mark.parametrize(("tasks", "said"), BAD, ids=range(len(BAD)))
def test_sections_that_cannot_be_used(tasks, said):
    with pytest.raises(ConfigError, match=said) as error:
        make_tasks(tasks)
    assert "\n" not in str(error.value)


LINES = [
    ("{", r"q\.jsonl:2 is not JSON"),
    ("[1]", r"q\.jsonl:2 = \[1\]: expected a section"),
    ('{"context": "a", "choices": ["b"]}', r"q\.jsonl:2\.answer is missing"),
    ('{"context": "a", "choices": ["b"], "answer": 1}', "answer 1 of 'a' must be"),
    ('{"context": 1, "choices": ["b"], "answer": 0}', r"q\.jsonl:2\.context = 1: expected str"),
    ('{"kontext": "a", "choices": ["b"], "answer": 0}', "did you mean 'context'"),
]


@pytest.mark.parametrize(("line", "said"), LINES, ids=range(len(LINES)))
def test_lines_that_are_no_records(line, said, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "a", "choices": ["b"], "answer": 0}\n' + line + "\n")
    with pytest.raises(ConfigError, match=said):
        make_tasks([{"name": "multiple_choice", "path": str(path)}])


def test_two_of_one_label_and_files_of_no_records(files, tmp_path):
    twice = [{"name": "bias", "path": files["pairs"]}] * 2
    with pytest.raises(ConfigError, match=r"tasks\.1: there is a 'bias' already"):
        make_tasks(twice)
    path = tmp_path / "none.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(ConfigError, match="holds no Pair"):
        make_tasks([{"name": "bias", "path": str(path)}])
    path.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        make_tasks([{"name": "bias", "path": str(path)}])


def test_a_run_keeps_its_tasks():
    """As plain values, which a checkpoint's config.json holds."""
    from ml_collections import ConfigDict

    tasks = [ConfigDict({"name": "perplexity", "domains": {"a": "b.txt"}})]
    run = run_config(eval={"tasks": tasks, "tasks_every": 5})
    assert run.eval.tasks == ({"name": "perplexity", "domains": {"a": "b.txt"}},)
    assert json.dumps(run.eval.tasks)
    with pytest.raises(ConfigError, match=r"eval\.tasks_every = 5, but eval\.tasks is empty"):
        run_config(eval={"tasks_every": 5})
