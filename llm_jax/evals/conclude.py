"""What a finished run shows: its evaluators' scores, samples, and the report.

An objective names its evaluators: perplexity and compression file by file for text, its own metrics over
the held-out split, generated text against the targets.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from llm_jax.core.config import ConfigError, component, to_dict
from llm_jax.core.types import Model, Tokenizer
from llm_jax.data.held_out import held_out_documents
from llm_jax.data.prepare import Prepared
from llm_jax.evals.exact_match import ExactMatch
from llm_jax.evals.held_out import HeldOut
from llm_jax.evals.perplexity import (
    Comparison,
    Document,
    Perplexity,
    compare_with_compressors,
    summarize,
)
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.metrics.report import write_report
from llm_jax.nn.precision import with_precision
from llm_jax.sharding.rules import AxisRules
from llm_jax.training.config import RunConfig
from llm_jax.transforms import merged


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """summary: by the evaluators; files: by model and by compressors, worst first, where text is scored.

    examples: (source, generated text, target) where texts are generated, the wrong ones first.
    problems: what could not be measured and why, a line each.
    """

    step: int
    summary: dict[str, float]
    files: list[Comparison] = dataclasses.field(default_factory=list)
    examples: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def save(self, workdir: Path) -> Path:
        """Writes WORKDIR/evals/scores_<step>.json, whole or not at all."""
        path = workdir / "evals" / f"scores_{self.step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        partial.rename(path)
        return path

    def compressors(self) -> dict[str, float]:
        """Bits per byte over all files, for "gzip" and "xz"."""
        size = max(sum(f.bytes for f in self.files), 1)
        return {
            name: sum(getattr(f, name) * f.bytes for f in self.files) / size
            for name in ("gzip", "xz")
        }


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    run: RunConfig,
    rules: AxisRules,
    workdir: Path,
    step: int,
    batch_size: int,
) -> Evaluation | None:
    """Runs the objective's evaluators on what a run holds out; None when that is no text.

    What one of them cannot do is among the `problems`, and the others' scores stay. In the compute dtype
    throughout, also after training in `matmul_dtype`: what is scored is what a checkpoint loads and
    exports as.
    """
    objective = component("objectives", run.objective.name).make(run.objective)
    precision = dataclasses.replace(model.precision, matmul_dtype=None)
    model = with_precision(nnx.clone(model), precision)
    evaluation = Evaluation(step, {})
    run_by_name = {
        # With what transforms keep beside the model: DPO asks for it.
        "held_out": lambda: evaluation.summary.update(
            HeldOut(objective, tokenizer, run, workdir, batch_size).run(model, rules)
        ),
        "exact_match": lambda: _match_texts(
            evaluation, ExactMatch(objective, tokenizer, run, workdir), merged(model), rules
        ),
        "perplexity": lambda: _score_texts(
            evaluation, merged(model), tokenizer, run, rules, workdir, batch_size
        ),
    }
    for name in objective.evaluators:
        try:
            run_by_name[name]()
        except ConfigError as error:
            evaluation.problems.append(str(error))
    return evaluation if evaluation.summary or evaluation.problems else None


def _match_texts(evaluation, exact_match, model, rules) -> None:
    if jax.process_count() == 1:  # one process alone can generate
        evaluation.summary.update(exact_match.run(model, rules))
        evaluation.examples.extend(exact_match.examples)


def _score_texts(evaluation, model, tokenizer, run, rules, workdir, batch_size) -> None:
    found = held_out_documents(run.data, workdir, run.eval.final_bytes)
    documents = [Document(d.name, d.text) for d in found]
    if not documents:
        return
    perplexity = Perplexity(
        documents, tokenizer, run.data.sequence_length, batch_size, run.eval.context
    )
    scores = perplexity.score(model, rules)
    evaluation.summary.update(summarize(scores))
    files = compare_with_compressors(documents, scores)
    evaluation.files.extend(sorted(files, key=lambda f: f.model / f.gzip, reverse=True))


def show(evaluation: Evaluation, console: Console, most_files: int = 12) -> None:
    """What the evaluators found, as tables."""
    for problem in evaluation.problems:
        console.print(problem, markup=False)
    if not evaluation.summary:
        return
    if evaluation.files:
        _show_files(evaluation, console, most_files)
        return
    table = Table(title="held out", title_justify="left")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    for name, value in evaluation.summary.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    for source, text, target in evaluation.examples[:3]:
        console.print(f"{source!r} -> {text!r}, wanted {target!r}", markup=False, highlight=False)


def _show_files(evaluation: Evaluation, console: Console, most_files: int) -> None:
    """The comparison with compressors, the files that the model does worst on first."""
    table = Table(title="held-out bits per byte", title_justify="left")
    for name in ("file", "bytes", "model", "gzip -9", "xz -9"):
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for f in evaluation.files[:most_files]:
        table.add_row(f.name, f"{f.bytes:,}", *(f"{x:.3f}" for x in (f.model, f.gzip, f.xz)))
    others = len(evaluation.files) - most_files
    if others > 0:
        table.add_row(f"... {others} more, where it does better", "", "", "", "")
    total = evaluation.compressors()
    bits = evaluation.summary["bits_per_byte"]
    table.add_section()
    table.add_row(
        f"all {len(evaluation.files)}",
        f"{evaluation.summary['bytes']:,}",
        *(f"[bold]{x:.3f}[/]" for x in (bits, total["gzip"], total["xz"])),
    )
    console.print(table)
    better = {
        name: sum(f.model < getattr(f, name) for f in evaluation.files) for name in ("gzip", "xz")
    }
    console.print(
        f"perplexity {evaluation.summary['perplexity']:.2f} per token; beats gzip -9 on "
        f"{better['gzip']} and xz -9 on {better['xz']} of {len(evaluation.files)} files"
    )


def sample(model: Model, tokenizer: Tokenizer, run: RunConfig) -> list[dict[str, str]]:
    """One completion for each of `eval.sample_prompts`."""
    if not run.eval.sample_prompts or not (
        hasattr(model, "init_cache") or hasattr(model, "encode")
    ):
        return []
    config = SamplingConfig(temperature=0.8, top_p=0.95, max_tokens=run.eval.sample_tokens)
    completions = Engine(merged(model), tokenizer).generate(list(run.eval.sample_prompts), config)
    return [
        {"prompt": prompt, "text": completion.text}
        for prompt, completion in zip(run.eval.sample_prompts, completions, strict=True)
    ]


def report(
    workdir: Path,
    title: str,
    run: RunConfig,
    prepared: Prepared,
    epochs: dict[str, float],
    num_params: int,
    evaluation: Evaluation | None,
    samples: list[dict[str, str]],
) -> Path:
    """Writes report.html."""
    summary: dict[str, Any] = {"parameters": f"{num_params:,}"}
    compression = None
    if evaluation is not None and not evaluation.files:
        summary = {n: round(value, 4) for n, value in evaluation.summary.items()} | summary
    elif evaluation is not None:
        total = evaluation.compressors()
        summary = {
            "held-out bits per byte": round(evaluation.summary["bits_per_byte"], 3),
            "gzip -9": round(total["gzip"], 3),
            "xz -9": round(total["xz"], 3),
            "perplexity per token": round(evaluation.summary["perplexity"], 2),
            **summary,
        }
        compression = [
            {
                "name": f.name,
                "bytes": f.bytes,
                "model_bpb": f.model,
                "gzip_bpb": f.gzip,
                "xz_bpb": f.xz,
            }
            for f in evaluation.files
        ]
    data = {
        index.source["path"]: {
            "documents": index.documents("train"),
            "held out": index.documents("held_out"),
            "tokens": index.tokens("train"),
            "bytes": index.text_bytes("train"),
            "epochs": round(epochs.get(index.folder.name, 0.0), 3),
        }
        for index in prepared.indices
    }
    return write_report(
        workdir,
        title=title,
        config=to_dict(run),
        summary=summary,
        samples=samples,
        data=data,
        compression=compression,
    )


def conclude(
    model: Model,
    prepared: Prepared,
    run: RunConfig,
    rules: AxisRules,
    workdir: Path,
    *,
    title: str,
    step: int,
    epochs: dict[str, float],
) -> Evaluation | None:
    """Evaluates, samples and reports; process 0 prints and writes."""
    console = Console(soft_wrap=not Console().is_terminal)
    first = jax.process_index() == 0
    batch_size = run.train.microbatch_size
    if first:
        console.print("evaluating on held-out documents")
    evaluation, samples = None, []
    try:
        evaluation = evaluate(model, prepared.tokenizer, run, rules, workdir, step, batch_size)
        samples = sample(model, prepared.tokenizer, run) if jax.process_count() == 1 else []
    except ConfigError as error:  # the corpus is gone, a prompt is too long: report what there is
        console.print(str(error), markup=False)
    if not first:
        return evaluation
    if evaluation is None:
        console.print("no held-out documents to show: see data.held_out_fraction")
    else:
        show(evaluation, console)
        if evaluation.summary:
            evaluation.save(workdir)
    for item in samples:
        console.rule(f"sample: {item['prompt']!r}", align="left")
        # An answer does not go on from its prompt.
        between = "\n" if hasattr(model, "encode") else ""
        console.print(item["prompt"] + between + item["text"], markup=False, highlight=False)
        console.rule()
    num_params = sum(x.size for x in jax.tree.leaves(nnx.state(merged(model), nnx.Param)))
    path = report(workdir, title, run, prepared, epochs, num_params, evaluation, samples)
    console.print(f"checkpoint {workdir / 'checkpoints' / str(step)}", highlight=False)
    console.print(f"report     {path}", highlight=False)
    return evaluation
