"""How a run lies on a target that is not there, by arithmetic alone: neither compiler nor devices.

Stand-ins with the coordinates of the real devices go through the mesh and the rules of training, so what
cannot be sharded is refused here in the same words, and each mesh axis covers the same links.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llm_jax.core.config import ConfigError, component
from llm_jax.nn.pipeline import count_microbatches
from llm_jax.nn.precision import Precision
from llm_jax.nn.transformer import TransformerConfig
from llm_jax.optim.make import OptimizerConfig, make_optimizer
from llm_jax.optim.schedule import ScheduleConfig, make_schedule
from llm_jax.planner.compiled import MeshAxis
from llm_jax.planner.layout import mesh_axes
from llm_jax.planner.topology import Target, parse_slices
from llm_jax.sharding.mesh import AXES, make_mesh, make_rules
from llm_jax.sharding.rules import AxisRules, logical_axes, path_name
from llm_jax.training.config import RunConfig
from llm_jax.training.program import batch_spec, state_shardings
from llm_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What mesh and spans ask of a jax.Device."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    coords: tuple[int, int, int] | None = None
    core_on_chip: int = 0
    slice_index: int | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter. axes: its logical axes. size: elements of all of it.

    kind: what it is for: "block", "expert" and "head" in matmuls, "embedding" in lookups, or "small".
    share: bytes of one device between uses, as float32. work: elements of one device when it is used,
    gathered, of one layer where layers are stacked. layers: 1, or how many a device runs. gathered_over:
    mesh axes that a use gathers it over, and its gradient is scattered over. copied_over: mesh axes whose
    devices hold the same share and other tokens.
    """

    path: str
    axes: tuple[str | None, ...]
    kind: str
    size: int
    share: int
    work: int
    layers: int
    gathered_over: tuple[str, ...]
    copied_over: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


@dataclasses.dataclass(frozen=True)
class Placement:
    """A run on a target. optimizer_bytes, batch_bytes: of one device.

    transformer: of the model, whatever it keeps. held: the mesh axes of each logical axis.
    items: times a pipeline's stage runs on a microbatch, and turns: times it runs, which is more; 1 and 1
    without a pipeline.
    """

    target: Target
    mesh: Mesh
    axes: Mapping[str, MeshAxis]
    rules: AxisRules
    transformer: TransformerConfig
    held: Mapping[str, tuple[str, ...]]
    weights: tuple[Weight, ...]
    optimizer_bytes: int
    batch_bytes: int
    items: int
    turns: int

    @property
    def turns_per_item(self) -> float:
        return self.turns / self.items

    @property
    def num_params(self) -> int:
        return sum(weight.size for weight in self.weights)

    def shares(self, logical_axis: str) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.held[logical_axis])

    @functools.cached_property
    def head(self) -> Weight | None:
        """What makes the logits: a tied embedding table is that too."""
        by_kind = {weight.kind: weight for weight in self.weights}
        return by_kind.get("head") or by_kind.get("embedding")


def place(run: RunConfig, target: Target) -> Placement:
    """Lays parameters, optimizer state and batch out.

    Raises:
      ConfigError: the mesh does not multiply to the devices, or a size does not divide over it.
    """
    try:
        mesh = make_mesh(run.mesh, stand_ins(target))
        rules = make_rules(run.mesh, mesh)
        items, turns = pipeline_turns(run, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    abstract, axes, objective = _shapes(run)
    shardings = state_shardings(abstract, axes, rules)
    spec = batch_spec(run, objective, rules)
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=_is_sharding)  # noqa: E731
    optimizer = zip(leaves(abstract.opt_state), leaves(shardings.opt_state), strict=True)
    return Placement(
        target=target,
        mesh=mesh,
        axes={axis.name: axis for axis in mesh_axes(mesh, _wrap(target))},
        rules=rules,
        transformer=_model_of(run).transformer(),
        held={name: rules.mesh_axes(name) for name in rules.rules},
        weights=_weights(abstract.params, axes, rules),
        optimizer_bytes=sum(_share(leaf, sharding) for leaf, sharding in optimizer),
        batch_bytes=sum(_share(leaf, leaf.sharding) for leaf in spec.values()),
        items=items,
        turns=turns,
    )


def _is_sharding(value: Any) -> bool:
    return isinstance(value, NamedSharding)


def _share(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def pipeline_turns(run: RunConfig, rules: AxisRules) -> tuple[int, int]:
    """(items, turns) of a Placement.

    Raises:
      ValueError: layers or rows that the pipeline does not fit.
    """
    stages = rules.shares("stage")
    if stages == 1:
        return 1, 1
    micro = count_microbatches(rules, run.model.num_layers, run.train.microbatch_size)
    items = rules.pipeline.rounds * micro
    return items, items + stages - 1


def _weights(params: Any, axes: Any, rules: AxisRules) -> tuple[Weight, ...]:
    whole = rules.gathered()
    tokens = rules.mesh_axes("batch") + rules.mesh_axes("length")
    weights = []
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(axes), strict=True
    ):
        names = names.names
        layers = leaf.shape[0] // rules.shares("layers") if names[0] == "layers" else 1
        held = {axis for name in names for axis in rules.mesh_axes(name)}
        at_work = {axis for name in names for axis in whole.mesh_axes(name)}
        weights.append(
            Weight(
                path=path_name(path),
                axes=names,
                kind=_kind(names),
                size=leaf.size,
                share=4 * math.prod(rules.sharding(names, leaf.shape).shard_shape(leaf.shape)),
                work=math.prod(whole.sharding(names, leaf.shape).shard_shape(leaf.shape)) // layers,
                layers=layers,
                gathered_over=tuple(a for a in AXES if a in held and a not in at_work),
                copied_over=tuple(a for a in AXES if a in tokens and a not in held),
            )
        )
    return tuple(weights)


def _kind(names: tuple[str | None, ...]) -> str:
    if "experts" in names:
        return "expert"
    if "vocab" in names:
        return "head" if names[-1] == "vocab" else "embedding"
    return "block" if "embed" in names and "position" not in names else "small"


def _model_of(run: RunConfig) -> Any:
    """The model whatever it keeps for the backward pass."""
    return dataclasses.replace(run.model, remat="none", scan_unroll=1)


def _shapes(run: RunConfig) -> tuple[TrainState, Any, Any]:
    """(abstract state, LogicalAxes, objective): the same whatever the mesh and what is kept."""
    abstract, axes = _state_shapes(_model_of(run), run.optimizer, run.schedule, run.train.num_steps)
    objective = component("objectives", run.objective.name).make(run.objective)
    return abstract, axes, objective


@functools.lru_cache(maxsize=8)
def _state_shapes(
    model: Any, optimizer: OptimizerConfig, schedule: ScheduleConfig, num_steps: int
) -> tuple[TrainState, Any]:
    precision = Precision.on("cpu", "bfloat16")
    make = component("models", model.name).make
    _, params, _ = nnx.split(
        nnx.eval_shape(lambda: make(model, precision=precision, rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    axes = logical_axes(params)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(params)
    )
    moments = make_optimizer(optimizer, make_schedule(schedule, num_steps), axes)
    opt_state = jax.eval_shape(moments.init, shapes)
    return TrainState(None, shapes, {}, opt_state, None), axes


@functools.lru_cache(maxsize=64)
def stand_ins(target: Target) -> tuple[StandIn, ...]:
    """The devices of a target, in the order of jax.devices()."""
    if target.kind != "tpu":
        per_group = target.num_chips // target.num_slices
        return tuple(
            StandIn(number, target.chip.kind, target.chip.name, number // per_group)
            for number in range(target.num_chips)
        )
    slices = parse_slices(target.name)
    places = itertools.product(range(slices.num_slices), *map(range, reversed(slices.shape)))
    cores = itertools.product(places, range(target.devices_per_chip))
    kind = target.chip.device_kinds[0]
    return tuple(
        StandIn(number, "tpu", kind, number // 4, (x, y, z), core, group)
        for number, ((group, z, y, x), core) in enumerate(cores)
    )


def _wrap(target: Target) -> tuple[bool, bool, bool]:
    return parse_slices(target.name).wrap if target.kind == "tpu" else (False, False, False)
