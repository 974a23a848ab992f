"""How a run lies on a target that is not there, by arithmetic alone: neither compiler nor devices.

Stand-ins with the coordinates of the real devices go through the mesh and the rules of training, so what
cannot be sharded is refused here in the same words, and each mesh axis covers the same links.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llm_jax.core.config import ConfigError, component
from llm_jax.nn.pipeline import count_microbatches
from llm_jax.nn.precision import Precision
from llm_jax.optim.freeze import Trained, trained_part
from llm_jax.optim.layer_decay import layer_scales, scaled
from llm_jax.optim.make import OptimizerConfig, make_optimizer
from llm_jax.optim.schedule import ScheduleConfig, make_schedule
from llm_jax.planner.compiled import MeshAxis
from llm_jax.planner.layout import mesh_axes
from llm_jax.planner.stacks import StackShape, check_mesh, head_length, length_at, stacks_of
from llm_jax.planner.topology import Target, parse_slices
from llm_jax.sharding.mesh import AXES, make_mesh, make_rules
from llm_jax.sharding.rules import AxisRules, path_name
from llm_jax.training.config import RunConfig
from llm_jax.training.program import axes_of, batch_spec, state_shardings
from llm_jax.training.state import TrainState
from llm_jax.transforms import transformed


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
    """One parameter, or what a transform froze. axes: its logical axes. size: elements of all of it.

    kind: what it is for: "block", "expert" and "head" in matmuls, "embedding" in lookups, or "small".
    share: bytes of one device between uses. work: elements of one device when it is used, gathered, of
    one layer where layers are stacked. layers: 1, or how many a device runs. gathered_over: mesh axes that
    a use gathers it over, and its gradient is scattered over. copied_over: mesh axes whose devices hold
    the same share and other tokens. length: tokens of a row that meet it. trained: the share of it that
    has a gradient to keep. frozen: whether a transform froze it, so that the optimizer never sees it.
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
    length: int
    trained: float
    frozen: bool

    @property
    def stacked(self) -> bool:
        return self.axes[:1] == ("layers",)

    @property
    def passes(self) -> int:
        """Products of each use with tokens, in both passes; LoRA needs the gradient of its base."""
        adapted = self.frozen and {"base", "codes"} & set(self.path.split("."))
        return 3 if self.trained or adapted else 2


@dataclasses.dataclass(frozen=True)
class Placement:
    """A run on a target. optimizer_bytes, batch_bytes: of one device.

    stacks: of the model, whatever it keeps; copies: rows that pass through them for each of the batch.
    head_length: tokens of a row that the head over the vocabulary sees, 0 without one. num_params: of the
    model, without what transforms add. held: the mesh axes of each logical axis.
    items: times a pipeline's stage runs on a microbatch, and turns: times it runs, which is more; 1 and 1
    without a pipeline.
    """

    target: Target
    mesh: Mesh
    axes: Mapping[str, MeshAxis]
    rules: AxisRules
    stacks: tuple[StackShape, ...]
    copies: int
    head_length: int
    num_params: int
    held: Mapping[str, tuple[str, ...]]
    weights: tuple[Weight, ...]
    optimizer_bytes: int
    batch_bytes: int
    items: int
    turns: int

    @property
    def turns_per_item(self) -> float:
        return self.turns / self.items

    def shares(self, logical_axis: str) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.held[logical_axis])

    @functools.cached_property
    def head(self) -> Weight | None:
        """What makes the logits: a tied embedding table is that too."""
        if not self.head_length:
            return None
        by_kind = {weight.kind: weight for weight in self.weights}
        return by_kind.get("head") or by_kind.get("embedding")


def place(run: RunConfig, target: Target) -> Placement:
    """Lays parameters, optimizer state and batch out.

    Raises:
      ConfigError: the mesh does not multiply to the devices, or a size does not divide over it.
    """
    objective = component("objectives", run.objective.name).make(run.objective)
    shapes = objective.batch_spec(run.train.batch_size, run.data.sequence_length)
    stacks, head = stacks_of(run.model, shapes), head_length(run.model, shapes)
    try:
        mesh = make_mesh(run.mesh, stand_ins(target))
        rules = make_rules(run.mesh, mesh)
        check_mesh(stacks, rules)
        items, turns = pipeline_turns(run, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    held = _state_shapes(
        _model_of(run), run.transforms, run.optimizer, run.schedule, run.train.num_steps
    )
    abstract = held.state
    shardings = state_shardings(
        abstract, held.axes, rules, extra_axes=held.extra_axes, trained=held.trained
    )
    spec = batch_spec(run, objective, rules)
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=_is_sharding)  # noqa: E731
    optimizer = zip(leaves(abstract.opt_state), leaves(shardings.opt_state), strict=True)
    return Placement(
        target=target,
        mesh=mesh,
        axes={axis.name: axis for axis in mesh_axes(mesh, _wrap(target))},
        rules=rules,
        stacks=stacks,
        copies=2 if "rejected_tokens" in shapes else 1,
        head_length=head,
        num_params=held.num_params,
        held={name: rules.mesh_axes(name) for name in rules.rules},
        weights=_weights(held, rules, stacks, head),
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


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a run holds between steps, the same whatever the mesh: shapes and LogicalAxes.

    num_params: of the model before its transforms.
    """

    state: TrainState
    axes: Any
    extra_axes: Any
    trained: Trained
    num_params: int


def _weights(
    held: _Held, rules: AxisRules, stacks: Sequence[StackShape], head: int
) -> tuple[Weight, ...]:
    """head: tokens of a row behind the stacks."""
    leaves = jax.tree_util.tree_leaves_with_path
    params = zip(leaves(held.state.params), jax.tree.leaves(held.axes), strict=True)
    extra = zip(leaves(held.state.extra), jax.tree.leaves(held.extra_axes), strict=True)
    whole = rules.gathered()
    found = []
    for frozen, pairs in ((False, params), (True, extra)):
        for (path, leaf), names in pairs:
            name, names = path_name(path), names.names
            trained = 0.0 if frozen else _trained_share(held.trained, name, leaf.shape)
            sizes = (rules.sharding(names, leaf.shape), whole.sharding(names, leaf.shape))
            share, work = (math.prod(s.shard_shape(leaf.shape)) for s in sizes)
            layers = leaf.shape[0] // rules.shares("layers") if names[:1] == ("layers",) else 1
            packed = 2 if leaf.dtype == "uint8" else 1  # two values of 4 bits
            at_rest = {axis for one in names for axis in rules.mesh_axes(one)}
            at_work = {axis for one in names for axis in whole.mesh_axes(one)}
            tokens = rules.mesh_axes("batch") + rules.mesh_axes("length")
            found.append(
                Weight(
                    path=name,
                    axes=names,
                    kind=_kind(name, names),
                    size=leaf.size * packed,
                    share=share * leaf.dtype.itemsize,
                    work=work * packed // layers,
                    layers=layers,
                    gathered_over=tuple(a for a in AXES if a in at_rest and a not in at_work),
                    copied_over=tuple(a for a in AXES if a in tokens and a not in at_rest),
                    length=length_at(name, stacks, head),
                    trained=trained,
                    frozen=frozen,
                )
            )
    return tuple(found)


def _trained_share(trained: Trained, path: str, shape: tuple[int, ...]) -> float:
    start = trained.starts.get(path, 0)
    return 0.0 if start is None else 1 - start / shape[0] if start else 1.0


def _kind(path: str, names: tuple[str | None, ...]) -> str:
    # Of a transform, what meets no tokens: factors of a sum, and first values.
    if path.rpartition(".")[2] in ("lora_a", "lora_b", "scales", "first") or len(names) < 2:
        return "small"
    if "experts" in names:
        return "expert"
    if "vocab" in names:
        return "head" if names[-1] == "vocab" else "embedding"
    return "block" if "embed" in names and "position" not in names else "small"


def _model_of(run: RunConfig) -> Any:
    """The model whatever it keeps for the backward pass."""
    return dataclasses.replace(run.model, remat="none", scan_unroll=1)


@functools.lru_cache(maxsize=8)
def _state_shapes(
    model: Any,
    transforms: tuple[Any, ...],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    num_steps: int,
) -> _Held:
    precision = Precision.on("cpu", "bfloat16")
    make = component("models", model.name).make

    def shapes(transforms: tuple[Any, ...]) -> tuple[nnx.State, nnx.State]:
        build = lambda: make(model, precision=precision, rngs=nnx.Rngs(0))  # noqa: E731
        changed = nnx.eval_shape(lambda: transformed(build(), transforms, nnx.Rngs(0)))
        return nnx.split(changed, nnx.Param, ...)[1:]

    params, extra = shapes(transforms)
    num_params = sum(x.size for x in jax.tree.leaves(shapes(()) if transforms else params))
    axes, extra_axes = axes_of(params), axes_of(extra)
    params, extra = (_plain_shapes(state) for state in (params, extra))
    trained = trained_part(optimizer.freeze, params, axes)
    moments = make_optimizer(optimizer, make_schedule(schedule, num_steps), trained.axes(axes))
    if optimizer.layer_decay is not None:
        scales = layer_scales(optimizer.layer_decay, params, axes)
        moments = scaled(moments, trained.part(scales))
    opt_state = jax.eval_shape(lambda params: moments.init(trained.part(params)), params)
    state = TrainState(None, params, extra, opt_state, None)
    return _Held(state, axes, extra_axes, trained, num_params)


def _plain_shapes(state: nnx.State) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))


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
