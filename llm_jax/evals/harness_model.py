"""EleutherAI's lm-evaluation-harness on our models: its tasks and its figures, our scorer and engine.

Tokens are cut and texts truncated as by its own Hugging Face backend with a bos in front, so that both give the
same figures (tests/evals/test_harness.py holds them side by side). Needs the extra `eval`.
"""

import collections
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import jinja2
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)

from llm_jax.core.config import ConfigError
from llm_jax.evals.scorer import Request
from llm_jax.evals.subject import Subject
from llm_jax.generate.sampler import SamplingConfig

# What a task's file, its data or its templates cause, deep in three libraries.
_NOT_OURS = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
             ImportError, RuntimeError, yaml.YAMLError, jinja2.TemplateError,
             datasets.exceptions.DatasetsError)  # fmt: skip
_MAX_TOKENS = 256  # of an answer, where a task does not say


class HarnessModel(TemplateLM):
    """What the harness asks of a model; cut: how many requests were longer than the model."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject, self.scorer, self.cut = subject, subject.scorer, 0

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.subject.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self.subject.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.subject.tokenizer.bos_id, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's cut, but never nothing: a continuation may be part of the context's last token."""
        context_ids, asked = super()._encode_pair(context, continuation)
        if not asked:
            request = Request.of(self.subject.tokenizer, context, continuation)
            context_ids, asked = list(request.context), list(request.continuation)
        return context_ids, asked

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self.scorer.score([Request(context, asked) for _, context, asked in requests])
        self.cut += sum(one.cut > 0 for one in found)
        return [(one.total, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        owners, windows = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.scorer.max_length, context_len=1
            )
            for window in rolling:
                context, asked = make_disjoint_window(window)
                owners.append(number)
                windows.append(Request(context, asked))
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, self.scorer.score(windows), strict=True):
            totals[owner] += one.total
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        by_settings = collections.defaultdict(list)
        for number, request in enumerate(requests):
            context, settings = request.args
            by_settings[json.dumps(settings, sort_keys=True)].append((number, context))
        texts = [""] * len(requests)
        for settings, group in by_settings.items():
            config = _sampling(json.loads(settings))
            room = self.scorer.max_length - config.max_tokens
            if room < 1:
                raise ConfigError(
                    f"a task asks for {config.max_tokens} new tokens, the model has "
                    f"{self.scorer.max_length} in all: set max_gen_toks"
                )
            prompts = [self.tok_encode(context) for _, context in group]
            self.cut += sum(len(prompt) > room for prompt in prompts)
            numbers = [number for number, _ in group]
            done = self.subject.engine.generate(
                [prompt[-room:] for prompt in prompts], config, row_numbers=numbers
            )
            for number, completion in zip(numbers, done, strict=True):
                texts[number] = completion.text
        return texts


def _sampling(settings: dict[str, Any]) -> SamplingConfig:
    """The harness's `generation_kwargs`, of which it passes what transformers would be told."""
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    limits = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    max_tokens = next((settings[name] for name in limits if settings.get(name)), _MAX_TOKENS)
    temperature = float(settings.get("temperature") or 0.0)
    sampled = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    return SamplingConfig(
        temperature=temperature if sampled else 0.0,
        top_k=(settings.get("top_k") or None) if sampled else None,
        top_p=(settings.get("top_p") or None) if sampled else None,
        max_tokens=int(max_tokens),
        stops=tuple(stop for stop in until if stop),
    )


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's own results, of tasks by name or by the path of a YAML file.

    Raises:
      ConfigError: a task that it does not know, or that cannot be read.
    """
    paths = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(f"there is no task file {missing[0]}")
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    # A group in a file names tasks of the harness.
    groups = [path for path in paths if "group:" in path.read_text(encoding="utf-8")]
    manager = _manager(bool(names or groups))
    matched = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, found in matched.items() if not found]
    if unknown:
        raise ConfigError(
            f"the harness knows no task {unknown[0]!r}: lm-eval ls tasks lists them; or give the path of a "
            "YAML file"
        )
    # Its bootstrap forks, which a process with jax's threads must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        return simple_evaluate(
            model=model,
            tasks=[*(name for found in matched.values() for name in found), *map(str, paths)],
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except (ConfigError, jax.errors.JaxRuntimeError):
        raise
    except _NOT_OURS as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"tasks {', '.join(tasks)}: {said[:300]}") from error


def table(results: dict[str, Any]) -> str:
    """As the harness prints it."""
    return make_table(results)


@functools.cache
def _manager(with_defaults: bool) -> TaskManager:
    """Reads the head of each of the harness's thousands of files, where a task is asked for by name."""
    return TaskManager(include_defaults=with_defaults)


def save(results: dict[str, Any], path: Path) -> None:
    """In the harness's format, with each item's scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)
    partial = path.with_suffix(".tmp")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.rename(path)
