"""The results of docs/results.md, each by one command on 2 CPU cores: `make results NAME=bert_nsp`.

    python -m bench.results translate_transformer     # en-zh, en-fr, en-de
    python -m bench.results bert_nsp --workdir /tmp/results
    python -m bench.results all

A result trains its config with `python -m llm_jax.train`, takes what that run itself measured on what it
held out, and sets a baseline beside it. A run that is there already goes on, or is taken as it is.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench import corpora, measure
from llm_jax.checkpoint.load import load_model
from llm_jax.core.config import component, load
from llm_jax.core.flags import RunError, run_entry
from llm_jax.data.held_out import held_out_documents
from llm_jax.data.pipeline import make_loader
from llm_jax.evals.perplexity import Document, Perplexity
from llm_jax.evals.subject import Subject
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.training.config import RunConfig

Rows = list[tuple]


def train(config: str, workdir: Path, *overrides: str) -> dict[str, float]:
    """Runs a config to its end; what it measured there, and its minutes."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "llm_jax.train", "--config", f"configs/{config}.py"]
    command += ["--workdir", str(workdir), *(f"--config.{text}" for text in overrides)]
    print(" ".join(command[2:]), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise RunError(f"the run in {workdir} failed")
    newest = max((workdir / "evals").glob("scores_*.json"), key=lambda path: path.stat().st_mtime)
    scores = json.loads(newest.read_text())["summary"]
    return scores | {"minutes": (time.perf_counter() - start) / 60}


def translate(config: str, workdir: Path) -> tuple[Sequence[str], Rows]:
    rows = []
    for pair in ("en-zh", "en-fr", "en-de"):
        scores = train(config, workdir / pair, f"data.sources.0.path={pair}")
        greedy, beams = (100 * scores[name] for name in ("exact_match", "exact_match_beams"))
        rows.append((pair, greedy, beams, scores["generated_examples"], scores["minutes"]))
    return ("pair", "greedy, % exact", "4 beams, % exact", "unseen numbers", "minutes"), rows


def bert_nsp(workdir: Path) -> tuple[Sequence[str], Rows]:
    scores = train("bert_tiny", workdir, "objective.pairs=next_sentence")
    return _bert_rows("B follows A", workdir, scores)


def bert_sop(workdir: Path) -> tuple[Sequence[str], Rows]:
    """From the model of bert_nsp, where [CLS] sees the texts: docs/results.md tells why."""
    first = workdir.parent / "bert_nsp"
    train("bert_tiny", first, "objective.pairs=next_sentence")
    scores = train("bert_tiny", workdir, "objective.pairs=sentence_order", f"init_from={first}")
    return _bert_rows("which of A and B comes first", workdir, scores)


def _bert_rows(question: str, workdir: Path, scores: dict) -> tuple[Sequence[str], Rows]:
    unigram = Unigram.of(workdir, "targets", "loss_weights")
    labels = held_out_values(workdir, "labels", "label_weights")
    majority = max(np.bincount(labels)) / len(labels)
    return ("held out", "model", "baseline"), [
        ("masked tokens, nats", scores["cross_entropy"], unigram.nats),
        ("masked tokens right, %", 100 * scores["mlm_accuracy"], 100 * unigram.accuracy),
        (f"{question}, % right", 100 * scores["pair_accuracy"], 100 * majority),
        ("minutes", scores["minutes"], ""),
    ]


def t5_span(workdir: Path) -> tuple[Sequence[str], Rows]:
    scores = train("t5_tiny", workdir)
    unigram = Unigram.of(workdir, "targets", "loss_weights")
    return ("held out", "model", "baseline"), [
        ("tokens of spans, nats", scores["cross_entropy"], unigram.nats),
        ("tokens of spans right, %", 100 * scores["accuracy"], 100 * unigram.accuracy),
        ("minutes", scores["minutes"], ""),
    ]


def classify_fortunes(workdir: Path) -> tuple[Sequence[str], Rows]:
    path, labels = corpora.fortunes(workdir / "records")
    minilm = corpora.minilm(workdir / "minilm")
    run = workdir / "run"
    scores = train(
        "minilm_fortunes", run, f"data.sources.0.path={path}", f"objective.labels={tuple(labels)}",
        f"model.num_labels={len(labels)}", f"init_from=hf:{minilm}",
        f"data.tokenizer.path={minilm / 'tokenizer.json'}",
    )  # fmt: skip
    return ("held out", "MiniLM fine-tuned", "TF-IDF + logistic regression"), [
        (
            "topics right, %",
            100 * scores["accuracy"],
            100 * corpora.tfidf_accuracy(_run(run).data, run),
        ),
        ("minutes", scores["minutes"], ""),
    ]


def sft_docstrings(workdir: Path) -> tuple[Sequence[str], Rows]:
    chats = corpora.docstring_chats(workdir / "records")
    marks = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    base = train("gpt_tiny", workdir / "base", f"data.tokenizer.extra_tokens={marks}")
    about = (f"data.sources.0.path={chats}", f"init_from={workdir / 'base'}")
    before = train("sft_docstrings", workdir / "before", *about, "train.num_steps=1",
                   "schedule.learning_rate=1e-9", "schedule.warmup_steps=0")  # fmt: skip
    after = train("sft_docstrings", workdir / "run", *about)
    bits = _bits_per_byte(workdir / "base", workdir / "run")
    return ("held out", "base", "after LoRA"), [
        ("answers, nats per token", before["cross_entropy"], after["cross_entropy"]),
        ("source code, bits per byte", base["bits_per_byte"], bits),
        ("that changed by, %", "", 100 * (bits / base["bits_per_byte"] - 1)),
        ("minutes", base["minutes"], after["minutes"]),
    ]


def moe_tiny(workdir: Path) -> tuple[Sequence[str], Rows]:
    steps = f"train.num_steps={load('configs/moe_tiny.py').train.num_steps}"
    dense = train("gpt_tiny", workdir / "dense", steps)
    moe = train("moe_tiny", workdir / "moe")
    return ("held out", "dense", "2 of 8 experts"), [
        ("source code, bits per byte", dense["bits_per_byte"], moe["bits_per_byte"]),
        ("minutes", dense["minutes"], moe["minutes"]),
    ]


RESULTS: dict[str, Callable[[Path], tuple[Sequence[str], Rows]]] = {
    "translate_transformer": lambda workdir: translate("translate_transformer", workdir),
    "translate_t5": lambda workdir: translate("translate_t5", workdir),
    "bert_nsp": bert_nsp,
    "bert_sop": bert_sop,
    "t5_span": t5_span,
    "classify_fortunes": classify_fortunes,
    "sft_docstrings": sft_docstrings,
    "moe_tiny": moe_tiny,
}


class Unigram:
    """What always guessing by how often a token is a target gives: counted in training, tested held out.

    nats: per target, with one added to each count; accuracy: of always the commonest.
    """

    BATCHES = 200

    def __init__(self, counts: np.ndarray, targets: np.ndarray):
        logs = np.log((counts + 1.0) / np.sum(counts + 1.0))
        self.nats = float(-np.mean(logs[targets]))
        self.accuracy = float(np.mean(targets == np.argmax(counts)))

    @classmethod
    def of(cls, workdir: Path, key: str, weights: str) -> "Unigram":
        run = _run(workdir)
        counts = np.zeros(run.model.vocab_size)
        for _, batch in zip(range(cls.BATCHES), _batches(workdir, "train"), strict=False):
            counts += np.bincount(batch[key][batch[weights] > 0], minlength=len(counts))
        return cls(counts, held_out_values(workdir, key, weights))


def held_out_values(workdir: Path, key: str, weights: str) -> np.ndarray:
    """All values of a key of the held-out batches that have a weight."""
    return np.concatenate([b[key][b[weights] > 0] for b in _batches(workdir, "held_out")])


def _batches(workdir: Path, split: str) -> Iterator[dict[str, np.ndarray]]:
    loaded = load_model(workdir)
    objective = component("objectives", loaded.run.objective.name).make(loaded.run.objective)
    loader = make_loader(
        loaded.run.data, workdir=workdir, tokenizer=loaded.tokenizer, objective=objective,
        batch_size=loaded.run.train.batch_size, split=split,
    )  # fmt: skip
    try:
        yield from loader
    finally:
        loader.close()


def _run(workdir: Path) -> RunConfig:
    return load_model(workdir).run


def _bits_per_byte(texts_of: Path, model_of: Path) -> float:
    """Of one run's model on what another run held out."""
    base, loaded = _run(texts_of), load_model(model_of)
    found = held_out_documents(base.data, texts_of, base.eval.final_bytes)
    documents = [Document(d.name, d.text) for _, d in found]
    rules = make_rules(MeshConfig(), make_mesh(MeshConfig()))
    subject = Subject(loaded.model, loaded.tokenizer, rules, base.data.sequence_length, rows=8)
    return Perplexity(documents).run(subject).summary["bits_per_byte"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=(*RESULTS, "all"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/results"))
    measure.json_flag(parser)
    flags = parser.parse_args()
    found = {}
    for name in RESULTS if flags.name == "all" else (flags.name,):
        columns, rows = RESULTS[name](flags.workdir / name)
        measure.show(name, columns, rows, {})
        found[name] = {"columns": columns, "rows": rows}
    measure.write_json(flags.json, {"results": found, "machine": measure.machine()})


if __name__ == "__main__":
    run_entry(main)
