"""Logical axes to mesh axes.

Parameters and activations name their dimensions ("embed", "heads", "batch"); one table of rules says
which mesh axis holds which of them in shares. Mesh axes are named nowhere else.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

DEFAULT_RULES: dict[str, MeshAxes] = {
    # parameters
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "layers": None,
    "position": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
}


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """A mesh and the rules on it; hashable, so it can be a static argument of a jitted function."""

    mesh: Mesh
    table: tuple[tuple[str, MeshAxes], ...] = tuple(DEFAULT_RULES.items())

    @property
    def rules(self) -> Mapping[str, MeshAxes]:
        return dict(self.table)

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "array"
    ) -> NamedSharding:
        """The sharding of an array whose dimensions have these logical axes.

        Raises:
          ValueError: no rule for an axis, a mesh axis used twice, or a size that does not divide.
        """
        used: dict[str, str] = {}
        parts = []
        for axis, size in zip(axes, shape, strict=True):
            mesh_axes = self._mesh_axes(axis, name)
            shares = 1
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise ValueError(
                        f"{name} {axes}: rules send both {used[mesh_axis]!r} and {axis!r} to mesh "
                        f"axis {mesh_axis!r}; one of them must go elsewhere"
                    )
                used[mesh_axis] = axis
                shares *= self.mesh.shape[mesh_axis]
            if size % shares:
                raise ValueError(
                    f"{name}: axis {axis!r} of size {size} does not divide over mesh "
                    f"{' x '.join(mesh_axes)} of size {shares} (rule {axis} -> "
                    f"{', '.join(mesh_axes)}); choose a divisor of {size}"
                )
            parts.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _mesh_axes(self, axis: str | None, name: str) -> tuple[str, ...]:
        if axis is None:
            return ()
        if axis not in self.rules:
            raise ValueError(f"{name}: no rule for axis {axis!r}; axes: {', '.join(self.rules)}")
        target = self.rules[axis]
        return () if target is None else (target,) if isinstance(target, str) else tuple(target)


@dataclasses.dataclass(frozen=True)
class LogicalAxes:
    """The axis names of one parameter; a class of its own, so that it is a leaf of a tree."""

    names: tuple[str | None, ...]


def logical_axes(params: nnx.State) -> dict:
    """The LogicalAxes of each parameter, as a nested dict like `nnx.to_pure_dict(params)`."""
    named = jax.tree.map(
        lambda v: v.replace(LogicalAxes(v.axes)),
        params,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return nnx.to_pure_dict(named)


def shardings_for(abstract: Any, axes: Any, rules: AxisRules) -> Any:
    """A tree of NamedSharding for a tree of shapes and the tree of their LogicalAxes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, a: rules.sharding(a.names, leaf.shape, path_name(path)), abstract, axes
    )


def path_name(path: tuple) -> str:
    """`layers.mlp.up` for a jax key path."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


_active: contextvars.ContextVar[AxisRules | None] = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def use_rules(rules: AxisRules) -> Iterator[None]:
    """Within it, `constrain` acts on this mesh; entered while a program is traced."""
    token = _active.set(rules)
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout by logical axes; without active rules, x unchanged."""
    rules = _active.get()
    if rules is None:
        return x
    return jax.lax.with_sharding_constraint(x, rules.sharding(axes, x.shape, "activation"))
