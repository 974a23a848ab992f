"""lm-evaluation-harness by our scorer and by its own Hugging Face backend: the same tasks, the same CPU.

The bench model (GPT-2's architecture, 6 layers, D 384, float32, random weights) is exported for the other side.
Questions are lines of the standard library: which of four lines comes next, after some lines of context. Both
sides run one after the other in turns, compiled and warm; the median of the rounds counts, of the time inside the
backend's calls (the harness itself adds the same to both, 0.6 s of it to list the packages of the environment).
The log likelihoods of both must agree. The rate of the machine's matmul stands beside the table.

    python -m bench.evaluation [--items 100] [--json FILE]        needs the extras dev (torch, lm-eval)
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from bench.measure import interleaved, json_flag, machine, show, write_json
from llm_jax.core.types import Tokenizer
from llm_jax.data.tokenizers import sentencepiece
from llm_jax.evals import harness_model
from llm_jax.evals.subject import Subject
from llm_jax.export import hf
from llm_jax.models.gpt import Config, make
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.training.config import RunConfig, resolve

VOCAB_SIZE, MAX_LENGTH, ROUNDS = 8192, 1024, 3
MODEL = {
    "name": "gpt", "vocab_size": VOCAB_SIZE, "embed_dim": 384, "num_layers": 6, "num_heads": 6,
    "max_length": MAX_LENGTH, "norm": "layernorm", "norm_bias": True, "position": "learned",
    "activation": "gelu_tanh", "gated": False, "attention_bias": True,
    "attention_out_bias": True, "mlp_bias": True, "tie_embeddings": True,
}  # fmt: skip
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
num_fewshot: {shots}
fewshot_config: {{sampler: first_n, split: train}}
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def sources() -> list[str]:
    """Modules of the standard library."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def questions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    lines = [[line + "\n" for line in text.splitlines() if line.strip()] for text in sources()]
    files = [file for file in lines if len(file) > 40]
    found = []
    for _ in range(count):
        file = rng.choice(files)
        at = rng.randrange(20, len(file) - 1)
        right, others = file[at], [rng.choice(rng.choice(files)) for _ in range(3)]
        choices = rng.sample([right, *others], 4)
        context = "".join(file[at - rng.randrange(8, 20) : at])
        found.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return found


def sides(folder: Path, run: RunConfig, tokenizer: Tokenizer) -> Mapping[str, Any]:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(os.cpu_count())
    model = make(Config(**MODEL), precision=Precision(), rngs=nnx.Rngs(0))
    hf.make(say=lambda text: None).export(model, tokenizer, run, folder / "hf")
    rules = make_rules(MeshConfig(), make_mesh(MeshConfig()))
    return {
        "ours": harness_model.HarnessModel(Subject(model, tokenizer, rules, length=512)),
        "Hugging Face": HFLM(
            str(folder / "hf"), device="cpu", dtype="float32", batch_size=16, add_bos_token=True
        ),
    }


def tasks(folder: Path, items: int) -> dict[str, str]:
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions(items))) + "\n")
    shapes = {"choices": (CHOICES, 0), "choices, 5 shots": (CHOICES, 5), "texts": (ROLLING, 0)}
    paths = {}
    for number, (name, (text, shots)) in enumerate(shapes.items()):
        path = folder / f"task{number}.yaml"
        path.write_text(text.format(name=f"task{number}", data=data, shots=shots))
        paths[name] = str(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    json_flag(parser)
    parser.add_argument("--items", type=int, default=100)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    about = {"load_before": os.getloadavg()[0], "cores": os.cpu_count(), **machine()}
    run = resolve({
        "model": MODEL, "train": {"num_steps": 1, "batch_size": 1},
        "data": {"sequence_length": MAX_LENGTH,
                 "tokenizer": {"name": "sentencepiece", "vocab_size": VOCAB_SIZE}},
        "schedule": {"learning_rate": 1.0, "warmup_steps": 0},
    })  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = sentencepiece.train(sentencepiece.Config(vocab_size=VOCAB_SIZE), sources())
        models = sides(folder, run, tokenizer)
        for task, path in tasks(folder, arguments.items).items():
            rows.append({"task": task, **measure(models, path)})
    columns = ("task", "ours, s", "Hugging Face, s", "ratio", "nats differ by")
    title = f"lm-evaluation-harness, {arguments.items} items, 14M parameters, float32"
    show(title, columns, [list(row.values()) for row in rows], about)
    write_json(arguments.json, {"machine": about, "results": rows})


@contextlib.contextmanager
def timed(model: Any) -> Iterator[list[float]]:
    """Gives the seconds of each call that the harness makes of a model."""
    seconds: list[float] = []

    def watched(method: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            answer = method(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return answer

        return call

    names = ("loglikelihood", "loglikelihood_rolling")
    for name in names:
        setattr(model, name, watched(getattr(model, name)))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(model, name)


def measure(models: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Seconds of both sides, and by how much the log likelihoods differ that they give."""
    found: dict[str, np.ndarray] = {}

    def run(name: str) -> float:
        with contextlib.redirect_stderr(io.StringIO()), timed(models[name]) as seconds:
            results = harness_model.run_tasks(models[name], [path])
        (samples,) = results["samples"].values()
        answers = [answer for sample in samples for (answer,) in sample["resps"]]
        found[name] = np.array([a[0] if isinstance(a, tuple) else a for a in answers], np.float64)
        return sum(seconds)

    seconds = interleaved({name: functools.partial(run, name) for name in models}, ROUNDS)
    ours, theirs = seconds["ours"], seconds["Hugging Face"]
    gap = np.abs(found["ours"] - found["Hugging Face"]).max()
    if gap > 1e-2:
        raise SystemExit(f"log likelihoods differ by {gap:.1e} nats")
    return {"ours": ours, "Hugging Face": theirs, "ratio": theirs / ours, "gap": f"{gap:.1e}"}


if __name__ == "__main__":
    main()
