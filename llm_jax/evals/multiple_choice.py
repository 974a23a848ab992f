"""Multiple choice by likelihood: which answer the model finds most probable after the question.

The log probability of a whole answer favours short ones. Per byte it does not, without blanks in front, as
lm-evaluation-harness's acc_bytes has it, nor per token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.evals.calibration import calibration_error
from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.records import read_records
from llm_jax.evals.scorer import Request
from llm_jax.evals.subject import Subject


@dataclasses.dataclass(frozen=True)
class Config:
    """path: JSON lines of questions."""

    path: str
    name: str = "multiple_choice"
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """context: all that stands before the answer. choices: as they go on from it. answer: the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self):
        if not 0 <= self.answer < len(self.choices):
            raise ConfigError(
                f"answer {self.answer} of {self.context[-60:]!r} must be the number of a choice: "
                f"0..{len(self.choices) - 1}"
            )


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """An evaluator of causal models."""

    questions: Sequence[Question]

    def run(self, subject: Subject) -> Findings:
        """Shares of right answers in 0..1, by each way to compare; what else is known of them.

        accuracy, accuracy_per_byte, accuracy_per_token; calibration_error, of the softmax over the choices'
        log probabilities; questions, and cut, how many of them did not fit into the model whole.
        """
        requests = [
            request
            for question in self.questions
            for request in Request.several(subject.tokenizer, question.context, question.choices)
        ]
        scores = iter(subject.scorer.score(requests))
        by_name: dict[str, list[bool]] = {"": [], "_per_byte": [], "_per_token": []}
        confidences, num_cut = [], 0
        for question in self.questions:
            found = [next(scores) for _ in question.choices]
            totals = np.array([one.total for one in found])
            num_bytes = [max(len(choice.lstrip().encode()), 1) for choice in question.choices]
            num_tokens = [max(len(one.log_probabilities), 1) for one in found]
            for name, sizes in (("", 1), ("_per_byte", num_bytes), ("_per_token", num_tokens)):
                chosen = int(np.argmax(totals / sizes))
                by_name[name].append(chosen == question.answer)
            confidences.append(1 / np.exp(totals - totals.max()).sum())
            num_cut += any(one.cut for one in found)
        return Findings.of_items(
            {f"accuracy{name}": Items.of(self.questions, right) for name, right in by_name.items()},
            calibration_error=calibration_error(np.array(confidences), np.array(by_name[""])),
            questions=len(self.questions),
            cut=num_cut,
        )


def make(config: Config) -> MultipleChoice:
    return MultipleChoice(read_records(config.path, Question))
