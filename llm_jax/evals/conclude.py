"""What a finished run shows: its evaluation, samples, and the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.types import Model, Tokenizer
from llm_jax.data.prepare import Prepared
from llm_jax.evals.evaluation import Evaluation, Evaluator, evaluate
from llm_jax.evals.show import show
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.metrics.report import write_report
from llm_jax.metrics.scores import collect_scores
from llm_jax.sharding.rules import AxisRules
from llm_jax.training.config import RunConfig
from llm_jax.transforms import merged


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
    tasks: Mapping[str, Evaluator],
) -> Evaluation | None:
    """Evaluates, samples and reports; process 0 prints and writes."""
    console = Console(soft_wrap=not Console().is_terminal)
    first = jax.process_index() == 0
    batch_size = run.train.microbatch_size
    if first:
        console.print("evaluating on held-out documents")
    evaluation, samples = None, []
    try:
        evaluation = evaluate(
            model, prepared.tokenizer, run, rules, workdir, step, batch_size, tasks
        )
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
            collect_scores(workdir)
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
