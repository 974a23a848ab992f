"""lm-evaluation-harness by our scorer and by its own Hugging Face backend: the same figures, item by item."""

import json
import os
from types import SimpleNamespace

import jax
import pytest
from saved_run import save_run
from tiny import make_model, run_config

from llm_jax import evaluate
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals.subject import Subject
from llm_jax.export import hf as export_hf
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval")
harness = pytest.importorskip("llm_jax.evals.harness_model")

LENGTH = 96
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {folder}/choices.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 1
fewshot_config: {{sampler: first_n, split: train}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "texts": """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {folder}/texts.jsonl}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {folder}/choices.jsonl}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=259, max_length=LENGTH, init_stddev=0.3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Paths of the tasks above; some of their items are longer than the model."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"What comes after {i}?" + " Think." * (i % 3) * 8,
            "choices": [f" {i + 1}", f" {i - 1} of course", " nothing"],
            "answer": i % 3,
        }
        for i in range(8)
    ]
    texts = [{"text": f"{i} " * n + "你好"} for i, n in ((1, 3), (2, 150), (3, 47))]
    for name, items in (("choices", questions), ("texts", texts)):
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return [str(folder / f"{name}.yaml") for name in TASKS]


@pytest.fixture(scope="module")
def ours(model):
    rules = AxisRules(make_mesh(MeshConfig(), jax.devices()[:1]))
    tokenizer = raw_bytes.make(raw_bytes.Config())
    return harness.HarnessModel(Subject(model, tokenizer, rules))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """datasets writes nothing outside of the tests' folder."""
    import datasets

    kept = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = kept


def test_figures_are_those_of_the_hugging_face_backend(model, ours, tasks, tmp_path):
    pytest.importorskip("accelerate")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    sizes = {"vocab_size": 259, "max_length": LENGTH}
    run = run_config(model=sizes, data={"tokenizer": {"name": "raw_bytes"}})
    exporter = export_hf.make(export_hf.Config(), say=lambda text: None)
    exporter.export(model, ours.subject.tokenizer, run, tmp_path / "hf")
    theirs = huggingface.HFLM(str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    found, expected = (harness.run_tasks(one, tasks) for one in (ours, theirs))
    assert set(found["results"]) == {"choices", "texts", "answers"}
    for name, samples in expected["samples"].items():
        for a, b in zip(found["samples"][name], samples, strict=True):
            assert a["doc"] == b["doc"]
            if name == "answers":
                assert a["filtered_resps"] == b["filtered_resps"]
                continue
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                assert x == pytest.approx(y, abs=1e-3), (name, a["doc_id"])
    for name, metrics in expected["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found["results"][name][metric] == pytest.approx(value, abs=1e-3), (
                    name,
                    metric,
                )
    assert ours.cut > 0


def test_results_are_written_in_the_harness_s_format(ours, tasks, tmp_path):
    harness.save(harness.run_tasks(ours, tasks[:1], limit=2), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"acc,none", "acc_norm,none"} <= found["results"]["choices"].keys()
    assert len(found["samples"]["choices"]) == 2


def test_the_command(tasks, tmp_path, monkeypatch, capsys):
    """Of a run whose sequence was in shares, which a scorer does not cut."""
    sections = {"tokenizer": {"name": "raw_bytes"}, "sequence_length": 32}
    model = {"vocab_size": 264, "max_length": LENGTH}
    run = run_config(model=model, data=sections, mesh={"data": 1, "context": 4, "fsdp": 2})
    save_run(tmp_path, run)
    flags = ["evaluate", "--workdir", str(tmp_path), "--tasks", ",".join(tasks), "--limit", "3"]
    monkeypatch.setattr("sys.argv", flags)
    evaluate.main()
    printed = capsys.readouterr().out
    assert "|choices|" in printed.replace(" ", "")
    assert "requests were longer than the model" in printed
    found = json.loads(
        (tmp_path / "evals" / "tasks_1_choices-texts-answers_limit3.json").read_text()
    )
    assert set(found["results"]) == {"choices", "texts", "answers"}
    assert all(len(samples) == 3 for samples in found["samples"].values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--limit", "3"], "--limit goes with --tasks"),
        (["--tasks", " ,"], "names no task"),
        (["--tasks", "choices", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "choices", "--num_fewshot", "-1"], "--num_fewshot -1 must be at least 0"),
    ],
)
def test_flags_that_do_not_go(flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", "--workdir", str(tmp_path), *flags])
    with pytest.raises(RunError, match=said):
        evaluate.main()


def test_settings_of_transformers():
    config = harness._sampling(
        {"until": "\n", "max_gen_toks": None, "max_new_tokens": 7, "do_sample": False, "top_k": 0}
    )
    assert config == SamplingConfig(temperature=0.0, max_tokens=7, stops=("\n",))
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    assert harness._sampling(sampled) == SamplingConfig(0.7, None, 0.9, max_tokens=256)


class OfPairs:
    """Two letters a token, from the start: what follows changes the last one."""

    vocab_size, bos_id, eos_id, pad_id = 259, 0, 1, 2

    def encode(self, text):
        return [sum(map(ord, text[i : i + 2])) % 259 for i in range(0, len(text), 2)]


def test_a_continuation_that_is_in_the_context_s_last_token(ours):
    merging = harness.HarnessModel(SimpleNamespace(scorer=ours.scorer, tokenizer=OfPairs()))
    ((total, _),) = merging.loglikelihood([SimpleNamespace(args=("abc", "d"))])
    assert total < 0


def test_tasks_that_cannot_be_read_are_one_line(ours, tmp_path):
    path, data = tmp_path / "broken.yaml", tmp_path / "choices.jsonl"
    task = TASKS["choices"].format(folder=tmp_path)
    cases = [
        (task, None),  # no data
        ("task: [", None),
        (task, "{"),
        (task.replace("task: choices", "output: choices"), '{"question": "a"}'),
        (task, '{"quest": "a", "choices": ["b"], "answer": 0}'),
    ]
    for text, line in cases:
        path.write_text(text)
        data.unlink(missing_ok=True)
        if line is not None:
            data.write_text(line + "\n")
        with pytest.raises(ConfigError) as error:
            harness.run_tasks(ours, [str(path)])
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def test_tasks_that_are_not_there(ours):
    with pytest.raises(ConfigError, match="the harness knows no task 'hellaswagg'"):
        harness.run_tasks(ours, ["hellaswagg"])
    with pytest.raises(ConfigError, match=r"there is no task file nowhere\.yaml"):
        harness.run_tasks(ours, ["nowhere.yaml"])
