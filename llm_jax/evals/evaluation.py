"""What is measured of a model: by its objective's own evaluators, and by the tasks of `eval.tasks`.

An objective names its evaluators: perplexity and compression file by file for text, its own metrics over
the held-out split, generated text against the targets. A task is a section whose `name` picks a module of
evals/; its figures carry its label, or its name where it has none.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx

from llm_jax.core.config import ConfigError, component, parse_component
from llm_jax.core.types import Model, Tokenizer
from llm_jax.data.held_out import held_out_documents
from llm_jax.evals.exact_match import ExactMatch
from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.held_out import HeldOut
from llm_jax.evals.perplexity import (
    Comparison,
    Document,
    Perplexity,
    compare_with_compressors,
    found_in,
)
from llm_jax.evals.subject import Subject
from llm_jax.metrics.scores import scores_path
from llm_jax.metrics.writer import replace_file
from llm_jax.nn.precision import with_precision
from llm_jax.sharding.rules import AxisRules
from llm_jax.training.config import RunConfig
from llm_jax.transforms import merged


class Evaluator(Protocol):
    def run(self, subject: Subject) -> Findings: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """summary: figures by name; items: of those that come from items; files: by model and by
    compressors, worst first, where text is scored.

    examples: (source, generated text, target) where texts are generated, the wrong ones first.
    problems: what could not be measured and why, a line each.
    """

    step: int
    summary: dict[str, float]
    files: list[Comparison] = dataclasses.field(default_factory=list)
    examples: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    items: dict[str, Items] = dataclasses.field(default_factory=dict)

    def save(self, workdir: Path) -> Path:
        """Writes WORKDIR/evals/scores_<step>.json, whole or not at all.

        Figures that are there already and that this evaluation did not ask for stay.
        """
        path = scores_path(workdir, self.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self
        if path.exists():
            old = Evaluation.load(path)
            whole = dataclasses.replace(
                self, summary=old.summary | self.summary, items=old.items | self.items
            )
        text = json.dumps(dataclasses.asdict(whole), indent=1)
        replace_file(path, [text.encode() + b"\n"])
        return path

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """What `save` wrote.

        Raises:
          ConfigError: the file is none of these.
        """
        try:
            plain = json.loads(path.read_bytes())
            files = [Comparison(**file) for file in plain["files"]]
            examples = [tuple(example) for example in plain["examples"]]
            items = {name: Items.loaded(of) for name, of in plain.get("items", {}).items()}
            return cls(plain["step"], plain["summary"], files, examples, plain["problems"], items)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} is no evaluation ({type(error).__name__}: {error})"
            ) from None

    def add(self, findings: Findings, label: str | None = None) -> None:
        """What an evaluator found, its figures under `label`/."""
        prefix = "" if label is None else f"{label}/"
        self.summary.update({prefix + name: value for name, value in findings.summary.items()})
        self.items.update({prefix + name: items for name, items in findings.items.items()})

    def compressors(self) -> dict[str, float]:
        """Bits per byte over all files, for "gzip" and "xz"."""
        size = max(sum(f.bytes for f in self.files), 1)
        return {
            name: sum(getattr(f, name) * f.bytes for f in self.files) / size
            for name in ("gzip", "xz")
        }


def make_tasks(sections: Sequence[Mapping[str, Any]]) -> dict[str, Evaluator]:
    """The evaluators of `eval.tasks` by label, with their files read.

    Raises:
      ConfigError: a section that cannot be used, or two of one label.
    """
    tasks: dict[str, Evaluator] = {}
    for number, section in enumerate(sections):
        where = f"config.eval.tasks.{number}"
        config = parse_component("evals", section, where)
        label = config.label or config.name
        if label in tasks:
            raise ConfigError(f"{where}: there is a {label!r} already: give this one another label")
        tasks[label] = component("evals", config.name).make(config)
    return tasks


def run_tasks(tasks: Mapping[str, Evaluator], subject: Subject, into: Evaluation) -> None:
    """Adds what each task finds; what one of them cannot do is among the problems."""
    for label, task in tasks.items():
        try:
            into.add(task.run(subject), label)
        except ConfigError as error:
            into.problems.append(f"{label}: {error}")


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    run: RunConfig,
    rules: AxisRules,
    workdir: Path,
    step: int,
    batch_size: int,
    tasks: Mapping[str, Evaluator] | None = None,
) -> Evaluation | None:
    """Runs the objective's evaluators on what a run holds out, and the tasks; None when there is nothing.

    What one of them cannot do is among the `problems`, and the others' scores stay. In the compute dtype
    throughout, also after training in `matmul_dtype`: what is scored is what a checkpoint loads and
    exports as.
    """
    objective = component("objectives", run.objective.name).make(run.objective)
    evaluation = Evaluation(step, {})
    # Objectives are asked with what transforms keep beside the model, which DPO needs.
    trained = _subject(model, tokenizer, run, rules, batch_size)
    plain = dataclasses.replace(trained, model=merged(trained.model))
    run_by_name = {
        "held_out": lambda: evaluation.add(HeldOut(objective, run, workdir).run(trained)),
        "exact_match": lambda: _match_texts(evaluation, ExactMatch(objective, run, workdir), plain),
        "perplexity": lambda: _score_texts(evaluation, plain, run, workdir),
    }
    for name in objective.evaluators:
        try:
            run_by_name[name]()
        except ConfigError as error:
            evaluation.problems.append(str(error))
    run_tasks(tasks or {}, plain, evaluation)
    return evaluation if evaluation.summary or evaluation.problems else None


def ask(
    tasks: Mapping[str, Evaluator],
    step: int,
    model: Model,
    tokenizer: Tokenizer,
    run: RunConfig,
    rules: AxisRules,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Figures of the tasks while training goes on; problems are said."""
    subject = _subject(model, tokenizer, run, rules, run.train.microbatch_size)
    evaluation = Evaluation(step, {})
    run_tasks(tasks, dataclasses.replace(subject, model=merged(subject.model)), evaluation)
    for problem in evaluation.problems:
        say(f"step {step}: {problem}")
    return evaluation.summary


def _subject(
    model: Model, tokenizer: Tokenizer, run: RunConfig, rules: AxisRules, batch_size: int
) -> Subject:
    """In the compute dtype, whatever training multiplies in."""
    precision = dataclasses.replace(model.precision, matmul_dtype=None)
    model = with_precision(nnx.clone(model), precision)
    return Subject(model, tokenizer, rules, run.data.sequence_length, batch_size)


def _match_texts(evaluation: Evaluation, exact_match: ExactMatch, subject: Subject) -> None:
    if jax.process_count() == 1:  # one process alone can generate
        evaluation.add(exact_match.run(subject))
        evaluation.examples.extend(exact_match.examples)


def _score_texts(evaluation: Evaluation, subject: Subject, run: RunConfig, workdir: Path) -> None:
    found = held_out_documents(run.data, workdir, run.eval.final_bytes)
    documents = [Document(d.name, d.text, domain) for domain, d in found]
    if not documents:
        return
    scores = Perplexity(documents, run.eval.context).score(subject)
    evaluation.add(found_in(documents, scores))
    files = compare_with_compressors(documents, scores)
    evaluation.files.extend(sorted(files, key=lambda f: f.model / f.gzip, reverse=True))
