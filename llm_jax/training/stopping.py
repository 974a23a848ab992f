"""Early stopping: training ends when held-out data has been no better for a while (Prechelt 1998).

The state is plain data of each checkpoint, so that a resumed run decides as an uninterrupted one. Every
process computes the same sums, so all decide alike without a word.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from llm_jax.training.config import EvalConfig

# Names of metrics that are better when larger: "accuracy", "token_accuracy", "quiz/accuracy_per_byte",
# the harness's "hellaswag/acc_norm". All others, the loss first of them, are better when smaller.
_LARGER_IS_BETTER = re.compile(
    r"(^|[/_])(accuracy|match|f1|score|bleu|chrf)$"
    r"|(^|/)(accuracy_per_\w+|acc(_norm|_bytes|_mutual_info)?|exact_match\w*|pass@\d+|layer/\d+)(/|$)"
)


@dataclasses.dataclass(frozen=True)
class Stopping:
    """step, value: of the best evaluation so far, by `metric`; worse: evaluations there were after it."""

    metric: str
    step: int
    value: float
    worse: int = 0

    @classmethod
    def saved(cls, state: Mapping[str, Any] | None, config: EvalConfig) -> "Stopping | None":
        """The state of a checkpoint, if it serves this config."""
        if state is None or config.patience is None or state["metric"] != config.metric:
            return None
        return cls(**state)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def is_over(self, config: EvalConfig) -> bool:
        return config.patience is not None and self.worse >= config.patience


def after(state: Stopping | None, metric: str, step: int, metrics: Mapping[str, float]) -> Stopping:
    """The state after one more evaluation; a value as good as the best is not better."""
    value = metrics[metric]
    if state is None or math.isnan(state.value):
        return Stopping(metric, step, value)
    better = value > state.value if is_larger_better(metric) else value < state.value
    if better:
        return Stopping(metric, step, value)
    return dataclasses.replace(state, worse=state.worse + 1)


def is_larger_better(metric: str) -> bool:
    return _LARGER_IS_BETTER.search(metric) is not None
