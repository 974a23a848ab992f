"""Keeps what the parameters were before training, for objectives that compare with it, such as DPO.

It takes the memory of the parameters once more. LoRA needs none of it: its base is the first model.
"""

import dataclasses
import functools

import jax
from flax import nnx

from llm_jax.core.types import Model
from llm_jax.transforms.weight import Frozen, Weight, replaced


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "reference"


def make(config: Config):
    return functools.partial(apply, config=config)


def apply(model: Model, rngs: nnx.Rngs, *, config: Config) -> Model:
    """Keeps the first value of every parameter that is still trained, in place."""
    del rngs, config
    return replaced(model, nnx.Param, lambda path, p: KeptWeight(p))


class KeptWeight(Weight):
    """current: what is trained; first: what training began with."""

    def __init__(self, weight: nnx.Param):
        self.axes, self.current = weight.axes, weight
        self.first = Frozen(weight[...], axes=weight.axes)

    def value(self) -> jax.Array:
        return self.current[...]

    def reference(self) -> Frozen:
        return self.first

    def sharding(self) -> jax.sharding.Sharding | None:
        return getattr(self.current[...], "sharding", None)
