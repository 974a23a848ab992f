"""What docs/evaluation.md shows runs as it stands."""

import json
import re
import shlex
from pathlib import Path

import jax
import ml_collections
import pytest
from saved_run import save_run
from tiny import run_config

from llm_jax import evaluate
from llm_jax.evals.evaluation import make_tasks
from llm_jax.metrics.scores import read_scores

TEXT = Path("docs/evaluation.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
ASKED, EXAMPLE = (text for language, text in BLOCKS if language == "python")
COMMANDS = [
    shlex.split(line) for language, text in BLOCKS if not language for line in text.splitlines()
]
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: quiz.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
fewshot_config: {sampler: first_n, split: train}
metric_list: [{metric: acc}]
"""


@pytest.fixture
def runs(tmp_path, monkeypatch, corpus):
    """Two runs whose text is there, and the files that the guide names."""
    model = {"vocab_size": 264, "max_length": 64}
    data = {
        "tokenizer": {"name": "raw_bytes"},
        "sources": [{"name": "text", "path": str(corpus / "prose")}],
    }
    schedule = {"learning_rate": 1e-2, "warmup_steps": 0}
    run = run_config(model=model, data=data, train={"num_steps": 1}, schedule=schedule)
    for name in ("gpt_tiny", "other"):
        save_run(tmp_path / "runs" / name, run, jax.devices()[:1])
    question = {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(question) + "\n")
    answer = {"text": "Paris is in", "references": ["France"]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    (tmp_path / "my_task.yaml").write_text(TASK)
    for file in ("src/a.py", "books/b.txt"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("some text\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_every_command(runs, monkeypatch, capsys):
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        assert command[:3] == ["python", "-m", "llm_jax.evaluate"]
        if "--compare" in command:
            monkeypatch.setattr("sys.argv", ["evaluate", "--workdir", "runs/other"])
            evaluate.main()
        if "--tasks" in command:
            pytest.importorskip("lm_eval")
            import datasets

            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", runs / "datasets")
        monkeypatch.setattr("sys.argv", ["evaluate", *command[3:]])
        evaluate.main()
    said = capsys.readouterr().out
    assert "held-out bits per byte" in said
    assert "multiple_choice/accuracy" in said
    assert "B - A" in said
    assert "my_task" in said
    assert read_scores(runs / "gpt_tiny")[1]["multiple_choice/questions"] == 1


def test_the_tasks_of_a_config(runs):
    pytest.importorskip("sacrebleu")
    config = ml_collections.ConfigDict({"eval": {"tasks": (), "tasks_every": 1}}, type_safe=False)
    exec(compile(ASKED, "docs/evaluation.md", "exec"), {"config": config})
    run = run_config(eval=config.eval)
    assert run.eval.tasks_every == 1000
    assert list(make_tasks(run.eval.tasks)) == ["multiple_choice", "perplexity", "generation"]


def test_the_example(runs, capsys):
    exec(compile(EXAMPLE, "docs/evaluation.md", "exec"), {})
    assert "'accuracy_per_byte': " in capsys.readouterr().out
