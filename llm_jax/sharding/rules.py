"""Logical axes to mesh axes.

Parameters and activations name their dimensions ("embed", "heads", "batch"); one table of rules says
which mesh axis holds which of them in shares. Mesh axes are named nowhere else.

A strategy is a shape of the mesh, since a mesh axis of size 1 shares nothing:

| strategy                    | mesh                                                          |
|-----------------------------|---------------------------------------------------------------|
| DDP                         | data=-1                                                       |
| FSDP (ZeRO stage 3)         | fsdp=-1                                                       |
| HSDP                        | fsdp=-1 within a slice, dcn.data=-1 across slices             |
| FSDP and tensor             | fsdp=-1, tensor=4; rules="sequence" for norms in shares too   |
| 3D                          | pipeline=4, fsdp=-1, tensor=4                                 |
| long sequences              | fsdp=-1, context=8                                            |
| mixture of experts          | fsdp=-1, expert=8                                             |
| ZeRO stage 1                | fsdp=-1, rules="zero1"                                        |
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

DEFAULT_RULES: dict[str, MeshAxes] = {
    # parameters
    "layers": "pipeline",
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "features": None,  # of norms and biases: too small to be worth a gather
    "mlp": "tensor",
    "position": None,
    "experts": "expert",
    "expert_embed": ("fsdp", "context"),
    "router": None,
    "labels": None,
    # activations
    "batch": ("data", "fsdp", "expert", "pipeline"),  # all stages share embedding, head and loss
    "stage_batch": ("data", "fsdp", "expert"),  # within a pipeline
    "length": "context",
    "residual_length": "context",  # between the blocks
    "activation_embed": None,
    "stage": "pipeline",
}

RULE_SETS: dict[str, dict[str, MeshAxes]] = {
    "default": DEFAULT_RULES,
    # Norms and residuals in shares of the sequence over "tensor" as well (Korthikanti et al. 2022):
    # the all-reduce after each half of a block becomes a reduce-scatter and an all-gather.
    "sequence": DEFAULT_RULES | {"residual_length": ("context", "tensor")},
    # Whole parameters, optimizer state in shares (Rajbhandari et al. 2020): no weight is gathered in
    # the forward or the backward pass, for models that fit.
    "zero1": DEFAULT_RULES | {"embed": None, "expert_embed": None},
}


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """Microbatches that follow each other (None: see nn/pipeline.py), and how often each passes all stages."""

    microbatches: int | None = None
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """A mesh and the rules on it; hashable, so it can be a static argument of a jitted function.

    copies: the name of the `vmap` over copies of the parameters, inside one (training/step.py).
    """

    mesh: Mesh
    table: tuple[tuple[str, MeshAxes], ...] = tuple(DEFAULT_RULES.items())
    pipeline: PipelineSchedule = PipelineSchedule()
    copies: str | None = None

    @property
    def rules(self) -> Mapping[str, MeshAxes]:
        return dict(self.table)

    def mesh_axes(self, axis: str | None, name: str = "array") -> tuple[str, ...]:
        """The axes of this mesh that share a logical axis; those of size 1 are left out.

        Raises:
          ValueError: no rule for this axis.
        """
        if axis is None:
            return ()
        if axis not in self.rules:
            raise ValueError(f"{name}: no rule for axis {axis!r}; axes: {', '.join(self.rules)}")
        target = self.rules[axis]
        target = () if target is None else (target,) if isinstance(target, str) else target
        return tuple(a for a in target if self.mesh.shape.get(a, 1) > 1)

    def shares(self, axis: str) -> int:
        """Into how many parts a logical axis is cut."""
        return math.prod(self.mesh.shape[a] for a in self.mesh_axes(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array with these logical axes, unchecked; see `sharding`."""
        parts = (self.mesh_axes(axis) for axis in axes)
        return PartitionSpec(*(p if len(p) > 1 else p[0] if p else None for p in parts))

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "array"
    ) -> NamedSharding:
        """The sharding of an array whose dimensions have these logical axes.

        Raises:
          ValueError: no rule for an axis, a mesh axis used twice, or a size that does not divide.
        """
        used: dict[str, str] = {}
        for axis, size in zip(axes, shape, strict=True):
            mesh_axes = self.mesh_axes(axis, name)
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise ValueError(
                        f"{name} {axes}: rules send both {used[mesh_axis]!r} and {axis!r} to mesh "
                        f"axis {mesh_axis!r}; one of them must go elsewhere"
                    )
                used[mesh_axis] = axis
            shares = math.prod(self.mesh.shape[a] for a in mesh_axes)
            if size % shares:
                below = next(n for n in range(shares, 0, -1) if size % n == 0)
                raise ValueError(
                    f"{name}: axis {axis!r} of size {size} does not divide over mesh "
                    f"{' x '.join(mesh_axes)} of size {shares} (rule {axis} -> "
                    f"{', '.join(mesh_axes)}); the nearest below that works is {below}"
                )
        return NamedSharding(self.mesh, self.spec(*axes))

    def length_order(self, length: int) -> np.ndarray:
        """[T] int32: which token of a row stands at each index of the arrays on the mesh.

        Where the sequence is in C shares, share i gets chunks i and 2C - 1 - i of 2C: under a causal
        mask each then has the same work (Llama 3, section 3.3.2).

        Raises:
          ValueError: the length is not a multiple of 2C.
        """
        shares = self.shares("length")
        places = np.arange(length, dtype=np.int32)
        if shares == 1:
            return places
        if length % (2 * shares):
            raise ValueError(
                f"sequence length {length} does not divide into 2 x {shares} chunks over mesh "
                f"{' x '.join(self.mesh_axes('length'))}; the nearest that works is "
                f"{max(1, round(length / (2 * shares))) * 2 * shares}"
            )
        chunks = places.reshape(2 * shares, -1)
        pairs = [(i, 2 * shares - 1 - i) for i in range(shares)]
        return chunks[np.array(pairs).ravel()].ravel()

    def within_pipeline(self) -> "AxisRules":
        """The rules inside the stages of a pipeline, whose stage axis belongs to the stages."""
        table = self.rules | {"batch": self.rules["stage_batch"], "layers": None}
        return dataclasses.replace(self, table=tuple(table.items()))

    def gathered(self) -> "AxisRules":
        """The rules of weights at work: whole over the axes that share the batch."""
        table = self.rules | {"embed": None, "expert_embed": None}
        return dataclasses.replace(self, table=tuple(table.items()))

    def copy_axes(self) -> tuple[str, ...]:
        """The mesh axes over which whole copies of the parameters each see their own rows."""
        shared = {"pipeline", *self.mesh_axes("embed"), *self.mesh_axes("experts")}
        axes = self.mesh_axes("batch")
        return tuple(itertools.takewhile(lambda axis: axis not in shared, axes))

    def without(self, mesh_axes: tuple[str, ...]) -> "AxisRules":
        """The rules inside a `vmap` over these mesh axes of the batch."""
        rest = {
            name: tuple(a for a in self.mesh_axes(name) if a not in mesh_axes)
            for name in ("batch", "stage_batch")
        }
        return dataclasses.replace(self, table=tuple((self.rules | rest).items()))

    def of_optimizer(self) -> "AxisRules":
        """The rules of what the optimizer keeps: in shares even where the parameters are whole."""
        table = self.rules | {name: DEFAULT_RULES[name] for name in ("embed", "expert_embed")}
        return dataclasses.replace(self, table=tuple(table.items()))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


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


def active_rules() -> AxisRules | None:
    """The rules that `constrain` acts on, or None."""
    return _active.get()


def sum_over_copies(tree: Any) -> Any:
    """Sums over tokens of one copy of the parameters to those of all, where copies run apart."""
    rules = _active.get()
    if tree is None or rules is None or rules.copies is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.psum(x, rules.copies), tree)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout by logical axes; without active rules, x unchanged."""
    rules = _active.get()
    if rules is None:
        return x
    return jax.lax.with_sharding_constraint(x, rules.sharding(axes, x.shape, "activation"))
