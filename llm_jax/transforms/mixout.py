"""Mixout (Lee et al. 2019): dropout towards the parameters that fine-tuning began with.

In each step every element of a target is, with probability p, its first value w0 instead of w, and the
rest is moved so that the mean stays w: (m w0 + (1 - m) w - p w0) / (1 - p). Evaluation and export see w.
Dropout is the case w0 = 0. Give it no weight decay beside: that pulls to zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.paths import matching
from llm_jax.core.types import Model
from llm_jax.transforms.reference import KeptWeight
from llm_jax.transforms.weight import replaced


@dataclasses.dataclass(frozen=True)
class Config:
    """targets: patterns of dotted paths. The first values take the memory of the targets once more."""

    probability: float = 0.7
    targets: tuple[str, ...] = ("*.layers.*",)
    name: str = "mixout"

    def __post_init__(self):
        if not 0 < self.probability < 1:
            raise ValueError(f"probability {self.probability} must lie in (0, 1)")


def make(config: Config):
    return functools.partial(apply, config=config)


def apply(model: Model, rngs: nnx.Rngs, *, config: Config) -> Model:
    """Mixes the targets, in place.

    Raises:
      ConfigError: a pattern that matches nothing.
    """
    del rngs
    params = {}
    replaced(model, nnx.Param, lambda path, p: params.setdefault(path, p))
    where = "transforms.mixout.targets"
    targets = {path for pattern in config.targets for path in matching(pattern, params, where)}
    return replaced(
        model,
        nnx.Param,
        lambda path, p: MixedWeight(p, config.probability) if path in targets else p,
    )


class MixedWeight(KeptWeight):
    def __init__(self, weight: nnx.Param, probability: float):
        super().__init__(weight)
        self.probability = probability

    def drawn(self, key: jax.Array) -> jax.Array:
        first, p = self.first[...], self.probability
        is_first = jax.random.bernoulli(key, p, first.shape)
        # w0 + (w - w0) / (1 - p), where it is not w0, has the mean w.
        return first + jnp.where(is_first, 0.0, (self.current[...] - first) / (1 - p))
