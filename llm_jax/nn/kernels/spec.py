"""What every attention kernel computes, as one static value."""

import dataclasses
from typing import Literal

Kernel = Literal["auto", "reference", "blockwise", "splash", "cudnn"]
Layout = Literal["btnh", "bnth"]

MASKED = -1e30  # finite, so that a row with nothing to see does not turn into NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query sees among those of its own segment, and how scores are bounded.

    causal:   no key of a later position.
    window:   at most this many positions, its own included (Mistral); where not causal, the keys at
              a distance below it on both sides.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap) before the mask (Gemma 2).
    """

    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"attention window {self.window}: expected at least 1 (the query itself), or None"
            )
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(
                f"attention soft_cap {self.soft_cap}: expected a positive bound, or None"
            )
