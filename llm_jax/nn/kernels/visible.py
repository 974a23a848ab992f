"""The static part of the mask, by natural index in a row: what every block of it can skip.

The rule of nn/mask.py speaks of positions, this one of indices. Within a segment the two differ by
a constant, since tokens of a document stand one after the other.
"""

import dataclasses
import functools

import numpy as np

from llm_jax.nn.kernels.spec import AttentionSpec


@dataclasses.dataclass(frozen=True)
class Visible:
    """Which index of a key the index of a query sees; hashable, since it is static."""

    causal: bool
    window: int | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> "Visible":
        return cls(spec.causal, spec.window)

    def __call__(self, query, key):
        """int32 arrays that broadcast, to bool; not for a mask that hides nothing."""
        seen = [query >= key] if self.causal else []
        if self.window is not None:
            seen.append(query - key < self.window)
            if not self.causal:
                seen.append(key - query < self.window)
        return functools.reduce(lambda a, b: a & b, seen)

    def extent(self, low: int, high: int, first: int, last: int) -> bool | None:
        """What queries low..high see of keys first..last: True all, False nothing, None ask each."""
        nearest, farthest = low - last, high - first  # as distances back from the query
        least = 0 if self.causal else -np.inf if self.window is None else 1 - self.window
        most = np.inf if self.window is None else self.window - 1
        if nearest >= least and farthest <= most:
            return True
        return False if farthest < least or nearest > most else None
