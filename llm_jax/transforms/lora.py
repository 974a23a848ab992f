"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023): frozen weights, trained low-rank additions.

A weight W becomes W + (alpha / rank) A B, with A normal and B zero, so that training starts from the very
model. All else is frozen, except what `full` names. Each expert of a mixture has an A and a B of its own.

Unusual: the sum is formed where the weight is used, a layer at a time, instead of sending activations
through A and B. It costs D F rank products for a weight of D x F, next to D F for each token of the
batch, and one layer's memory; in return it is exact, works in every model and under every mesh, and merging
is the same formula. What it does not save is the product for the gradient of W, which A and B get theirs
from. qwix has LoRA, too, but finds weights by watching einsums: it does not see ours, which pass through
custom derivatives inside a scan.
"""

import dataclasses
import functools
import math
import string
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.param import normal, param, zeros
from llm_jax.core.paths import matching
from llm_jax.core.types import Model
from llm_jax.transforms.quantized import Quantized
from llm_jax.transforms.weight import Frozen, Weight, replaced

STACKED = ("layers", "experts")


@dataclasses.dataclass(frozen=True)
class Config:
    """targets: patterns of dotted paths; the matrices among what they match are adapted.

    full: patterns of parameters trained whole besides, such as a new head over classes.
    quantize: how the frozen part of adapted weights is stored, in blocks of 64: "int8" in 8.25 bits a
    weight, "nf4" in 4.25 (QLoRA).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*.layers.*",)
    full: tuple[str, ...] = ()
    quantize: Literal["none", "int8", "nf4"] = "none"
    name: str = "lora"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha {self.alpha} must be positive")
        if not self.targets:
            raise ValueError("targets = (): name what to adapt, such as '*.attention.*'")


def make(config: Config):
    return functools.partial(apply, config=config)


def apply(model: Model, rngs: nnx.Rngs, *, config: Config) -> Model:
    """Adapts the targets and freezes the rest, in place.

    Raises:
      ConfigError: a pattern that matches nothing, or no matrix.
    """
    params = {}
    replaced(model, nnx.Param, lambda path, p: params.setdefault(path, p))
    targets, full = (
        {
            path
            for pattern in patterns
            for path in matching(pattern, params, f"transforms.lora.{key}")
        }
        for key, patterns in (("targets", config.targets), ("full", config.full))
    )
    targets = {path for path in targets - full if sides(path, params[path].axes) is not None}
    if not targets:
        raise ConfigError(f"transforms.lora.targets {config.targets!r} match no matrix")

    def change(path: str, p: nnx.Param) -> nnx.Param | Frozen | LoraWeight:
        if path in targets:
            return LoraWeight(path, p, config, rngs)
        return p if path in full else Frozen(p[...], axes=p.axes)

    return replaced(model, nnx.Param, change)


@dataclasses.dataclass(frozen=True)
class Sides:
    """How many axes of a weight are stacks of matrices, inputs and outputs, in this order."""

    stacked: int
    inputs: int
    outputs: int


def sides(path: str, axes: tuple[str | None, ...]) -> Sides | None:
    """How a parameter is a matrix; None: it is none, or one that maps no features to features."""
    stacked = sum(name in STACKED for name in axes)
    features = axes[stacked:]
    leaf = path.rpartition(".")[2]
    if len(features) < 2 or leaf == "scale" or leaf.endswith("bias") or "router" in features:
        return None
    ends_in_embed = features[-1] in ("embed", "expert_embed")
    inputs = len(features) - 1 if ends_in_embed else 1
    return Sides(stacked, inputs, len(features) - inputs)


class LoraWeight(Weight):
    """base: the frozen weight. lora_a: [..., inputs, r]; lora_b: [..., r, outputs], float32."""

    def __init__(self, path: str, weight: nnx.Param, config: Config, rngs: nnx.Rngs):
        self.axes, self.factor = weight.axes, config.alpha / config.rank
        self.sides = sides(path, weight.axes)
        shape, rank = weight.shape, (config.rank,)
        first, last = self.sides.stacked, self.sides.stacked + self.sides.inputs
        stddev = math.prod(shape[first:last]) ** -0.5
        self.lora_a = param(rngs, (*shape[:last], *rank), (*self.axes[:last], None), normal(stddev))
        self.lora_b = param(
            rngs,
            (*shape[:first], *rank, *shape[last:]),
            (*self.axes[:first], None, *self.axes[last:]),
            zeros,
        )
        if config.quantize == "none":
            self.base = Frozen(weight[...], axes=weight.axes)
        else:
            self.base = Quantized(path, weight[...], self.axes, config.quantize, stacked=first)

    def value(self) -> jax.Array:
        inputs = string.ascii_lowercase[: self.sides.inputs]
        outputs = string.ascii_uppercase[: self.sides.outputs]
        added = jnp.einsum(
            f"...{inputs}z,...z{outputs}->...{inputs}{outputs}",
            self.lora_a[...],
            self.lora_b[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        return self.base[...] + self.factor * added

    def reference(self) -> Frozen | Quantized:
        return self.base

    def sharding(self) -> jax.sharding.Sharding | None:
        stored = self.base.codes if isinstance(self.base, Quantized) else self.base
        return getattr(stored[...], "sharding", None)
