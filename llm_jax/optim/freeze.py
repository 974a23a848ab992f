"""Layers and parameters that are not trained: no gradient, no optimizer state, no weight decay."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import flat, matching, pick

# "stack.layers[:6].*": the first six of stacked layers.
FIRST_LAYERS = re.compile(r"(.*)\[:(\d+)\](.*)")


@dataclasses.dataclass(frozen=True)
class Trained:
    """Which part of the parameters is trained.

    starts: of each path that is not trained as a whole, the layer that training begins with, and
      None where nothing is trained.
    """

    starts: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    def part(self, params: Mapping) -> Mapping:
        """The nested dict of what is trained: of stacked layers the last ones, [L - n, ...]."""
        return self._part(params, lambda leaf, start: leaf[start:])

    def axes(self, axes: Mapping) -> Mapping:
        """The LogicalAxes of `part`."""
        return self._part(axes, lambda leaf, start: leaf)

    def _part(self, tree, cut):
        if not self.starts:
            return tree
        kept = pick(tree, [path for path in flat(tree) if self.starts.get(path, 0) is not None])
        return _mapped(kept, lambda path, leaf: cut(leaf, self.starts[path]), self.starts)

    def joined(self, part: Mapping, params: Mapping) -> Mapping:
        """`params` with `part` in its place."""
        if not self.starts:
            return part
        trained = flat(part)

        def join(path, leaf):
            start = self.starts.get(path, 0)
            if start is None:
                return leaf
            return jnp.concatenate([leaf[:start], trained[path]]) if start else trained[path]

        return _mapped(params, join, flat(params))


ALL = Trained()


def trained_part(freeze: Sequence[str], shapes: Mapping, axes: Mapping) -> Trained:
    """What `optimizer.freeze` leaves to train.

    Args:
      freeze: patterns of dotted paths; `NAME[:n]` stands for the first n of stacked layers.
      shapes, axes: nested dicts of the parameters' shapes and LogicalAxes.

    Raises:
      ConfigError: a pattern that matches nothing, more layers than there are, nothing left to train.
    """
    shapes, axes = flat(shapes), flat(axes)
    starts: dict[str, int | None] = {}
    for pattern in freeze:
        where = "config.optimizer.freeze"
        first = FIRST_LAYERS.fullmatch(pattern)
        if first is None:
            starts |= dict.fromkeys(matching(pattern, shapes, where))
            continue
        number = int(first[2])
        for path in matching(first[1] + first[3], shapes, where):
            layers = shapes[path].shape[0] if axes[path].names[:1] == ("layers",) else 0
            if number > layers:
                raise ConfigError(
                    f"{where} {pattern!r}: {path} has {layers or 'no'} stacked layers"
                )
            if starts.get(path, 0) is not None:
                starts[path] = None if number == layers else max(number, starts.get(path, 0))
    if all(starts.get(path, 0) is None for path in shapes):
        raise ConfigError(f"config.optimizer.freeze = {tuple(freeze)!r} leaves nothing to train")
    return Trained({path: start for path, start in starts.items() if start != 0})


def _mapped(tree: Mapping, change: Any, paths: Mapping, above: str = "") -> dict:
    """The nested dict with `change(path, leaf)` for the leaves at these paths."""
    out = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            out[name] = _mapped(value, change, paths, f"{path}.")
        else:
            out[name] = change(path, value) if path in paths else value
    return out
