"""Weights that are made of parts, in the place of plain parameters.

A module reads a weight as `self.query[...]`. A `Weight` in that place computes its value there: inside the
loop over layers, under any mesh, in every model, and no model knows. What is not trained is `Frozen`: it is
in TrainState.extra, in shares like any parameter, and no gradient, optimizer or weight decay sees it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from llm_jax.core.config import component
from llm_jax.core.types import Model


class Frozen(nnx.Variable):
    """An array that is not trained. axes: a logical axis name per dimension, as of an nnx.Param."""


class Weight(nnx.Module):
    """Stands in a module where an nnx.Param of these axes stood."""

    axes: tuple[str | None, ...]

    def value(self) -> jax.Array:
        """The float32 array that the module computes with."""
        raise NotImplementedError

    def drawn(self, key: jax.Array) -> jax.Array | None:
        """The value in one step of training; None: `value`, whatever the step."""
        del key

    def reference(self) -> "nnx.Variable | Weight":
        """What stands for the value before training (core/reference.py); itself, if nothing is trained."""
        return self

    def sharding(self) -> jax.sharding.Sharding | None:
        """Where the value belongs; None: the compiler may choose."""
        return None

    def __getitem__(self, index: Any) -> jax.Array:
        return self.value()[index]


def transformed(model: Model, configs: Sequence[Any], rngs: nnx.Rngs) -> Model:
    """The model after each of `config.transforms`, in place.

    Raises:
      ConfigError: a transform that does not fit the model.
    """
    for config in configs:
        model = component("transforms", config.name).make(config)(model, rngs)
    return model


def merged(model: Model) -> Model:
    """The same function made of plain parameters, as the model was before all transforms."""

    def plain(path: str, part: nnx.Variable | Weight) -> nnx.Param:
        del path
        value = _value_of(part) if isinstance(part, Weight) else part[...]
        return nnx.Param(value, axes=part.axes)

    kinds = (Weight, Frozen)
    if not any(isinstance(node, kinds) for _, node in nnx.iter_graph(model)):
        return model
    return replaced(nnx.clone(model), kinds, plain)


def _value_of(weight: Weight) -> jax.Array:
    """Laid out as its parts are, where they are on devices."""
    graphdef, state = nnx.split(weight)
    sharding = weight.sharding()
    return jax.jit(lambda state: nnx.merge(graphdef, state).value(), out_shardings=sharding)(state)


def drawn(model: Model, key: jax.Array | None) -> Model:
    """The model for one step of training: weights that are drawn by the step's key get their values."""
    if key is None:
        return model
    key = jax.random.fold_in(key, 2**31 - 1)  # apart from those that the model splits off
    count = itertools.count()

    def draw(path: str, weight: Weight) -> nnx.Param | Weight:
        del path
        value = weight.drawn(jax.random.fold_in(key, next(count)))
        return weight if value is None else nnx.Param(value, axes=weight.axes)

    return replaced(model, Weight, draw)


def replaced(
    model: Model, kinds: type | tuple[type, ...], change: Callable[[str, Any], Any]
) -> Model:
    """Puts `change(path, part)` in the place of every Variable or Weight of these kinds, in place.

    What two modules share is changed once; the parts of a Weight are left alone.
    """
    changed: dict[int, Any] = {}

    def visit(module: nnx.Module, above: str) -> None:
        for name, part in list(vars(module).items()):
            if isinstance(part, kinds):
                if id(part) not in changed:
                    changed[id(part)] = part, change(above + name, part)
                setattr(module, name, changed[id(part)][1])
            elif isinstance(part, nnx.Module | nnx.List) and id(part) not in changed:
                changed[id(part)] = part, part
                if not isinstance(part, Weight):
                    visit(part, f"{above}{name}.")

    visit(model, "")
    return model
