"""Tasks of lm-evaluation-harness as an evaluator, by config and by `evaluate --tasks` (extra `eval`)."""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import jax

from llm_jax.core.config import ConfigError
from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.subject import Subject


@dataclasses.dataclass(frozen=True)
class Config:
    """tasks: names of the harness, or paths of YAML files.

    num_fewshot: examples before each item; None: the task's own. limit: items of each task; None: all.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    name: str = "harness"
    label: str | None = None

    def __post_init__(self):
        if not self.tasks:
            raise ConfigError("harness.tasks is empty: name tasks, or paths of YAML files")
        for field, least in (("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigError(f"{field} {value} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class Harness:
    """An evaluator of models that generate; in float32 its figures are those of others on the export."""

    config: Config

    def run(self, subject: Subject) -> Findings:
        """TASK/METRIC of every task, and cut, requests that did not fit into the model whole."""
        results, cut = self.results(subject)
        return found_in(results, cut)

    def results(self, subject: Subject) -> tuple[dict[str, Any], int]:
        """What the harness returns, and how many requests were cut."""
        from llm_jax.evals import harness_model

        if jax.process_count() > 1:
            raise ConfigError("the harness asks in one process: evaluate in a job of one")
        model = harness_model.HarnessModel(subject)
        config = self.config
        results = harness_model.run_tasks(
            model, config.tasks, num_fewshot=config.num_fewshot, limit=config.limit
        )
        return results, model.cut


def make(config: Config) -> Harness:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-evaluation-harness: pip install 'llm_jax[eval]'")
    return Harness(config)


def found_in(results: Mapping[str, Any], cut: int) -> Findings:
    """The harness's figures without those of their errors; each item's, where the samples have it."""
    summary, items = {}, {}
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, chosen_by = key.partition(",")
            if not chosen_by or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            # "none" is no filter of the answers.
            name = f"{task}/{metric}" + ("" if chosen_by == "none" else f"/{chosen_by}")
            summary[name] = float(value)
            found = _items(results.get("samples", {}).get(task, ()), metric, chosen_by)
            # Of some figures samples hold something else, of a perplexity the log probability.
            if found is not None and math.isclose(found.mean, value, rel_tol=1e-6, abs_tol=1e-9):
                items[name] = found
    return Findings(summary | {"cut": cut}, items)


def _items(samples: Sequence[Mapping[str, Any]], metric: str, chosen_by: str) -> Items | None:
    """What the samples hold under a figure's name, if these are numbers."""
    chosen = [sample for sample in samples if sample.get("filter", "none") == chosen_by]
    values = [sample.get(metric) for sample in chosen]
    if not values or not all(isinstance(value, Real) for value in values):
        return None
    names = tuple(f"{sample['doc_hash'][:16]}#{sample['doc_id']}" for sample in chosen)
    return Items(names, tuple(map(float, values)), (1.0,) * len(values))
