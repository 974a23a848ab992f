"""All of a run that can be compiled: what training executes and what a planner inspects.

`build_program` reads no data and allocates nothing, so it also serves meshes of devices that are
not there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llm_jax.core.config import ConfigError, component, nearest
from llm_jax.core.types import Batch, Model, Objective
from llm_jax.nn.precision import Precision
from llm_jax.optim.freeze import ALL, Trained, trained_part
from llm_jax.optim.layer_decay import layer_scales, scaled
from llm_jax.optim.make import make_optimizer
from llm_jax.optim.schedule import make_schedule
from llm_jax.sharding import xla_flags
from llm_jax.sharding.mesh import make_rules
from llm_jax.sharding.place import batch_sharding
from llm_jax.sharding.rules import AxisRules, LogicalAxes, shardings_for, use_rules
from llm_jax.training.config import RunConfig
from llm_jax.training.state import TrainState
from llm_jax.training.step import Metrics, evaluation_step, train_step
from llm_jax.transforms import transformed


@dataclasses.dataclass(frozen=True)
class Plain:
    """The model before its transforms: what its parameters are made, loaded and exported as.

    shapes, axes: nested dicts of the parameters' shapes and LogicalAxes. init makes random ones;
    start makes the state that training begins with from given ones. Neither is jitted.
    """

    shapes: dict[str, Any]
    axes: dict[str, Any]
    init: Callable[[jax.Array], dict[str, Any]]
    start: Callable[[dict[str, Any], jax.Array], TrainState]


@dataclasses.dataclass(frozen=True)
class Program:
    """abstract_state: TrainState of ShapeDtypeStructs; state_shardings: the same tree of shardings.

    trained: which part of the parameters is. batch_spec: shapes of the global batch with their shardings.
    init, step and evaluate are jitted; step donates the state it is given.
    """

    graphdef: nnx.GraphDef
    plain: Plain
    objective: Objective
    optimizer: optax.GradientTransformation
    trained: Trained
    mesh: Mesh
    rules: AxisRules
    abstract_state: TrainState
    state_shardings: TrainState
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[Any, Any, Batch], dict]

    def model(self, state: TrainState) -> Model:
        """The model with this state's parameters."""
        return nnx.merge(self.graphdef, nnx.State(state.params), nnx.State(state.extra))

    def lower(self) -> jax.stages.Lowered:
        """The training step, lowered for the mesh, from shapes alone."""
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract_state,
            self.state_shardings,
        )
        return self.step.lower(state, self.batch_spec)

    @property
    def num_params(self) -> int:
        """Of the model, without what transforms add."""
        return sum(x.size for x in jax.tree.leaves(self.plain.shapes))

    @property
    def num_trained(self) -> int:
        """How many numbers a step changes."""
        part = jax.eval_shape(self.trained.part, self.abstract_state.params)
        return sum(x.size for x in jax.tree.leaves(part))


def build_program(config: RunConfig, mesh: Mesh) -> Program:
    """Puts model, objective and optimizer together for a mesh.

    Raises:
      ConfigError: sizes that do not divide over the mesh; names parameter, axis, size and rule. Patterns
        of parameters that match none.
    """
    rules = make_rules(config.mesh, mesh)
    make_model = _model_maker(config, mesh.devices.flat[0].platform)
    objective = component("objectives", config.objective.name).make(config.objective)
    graphdef, params, extra = _abstract(
        lambda: transformed(make_model(rngs=nnx.Rngs(0)), config.transforms, nnx.Rngs(0))
    )
    axes, shapes = axes_of(params), nnx.to_pure_dict(params)
    trained = trained_part(config.optimizer.freeze, shapes, axes)
    schedule = make_schedule(config.schedule, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, trained.axes(axes))
    if config.optimizer.layer_decay is not None:
        scales = layer_scales(config.optimizer.layer_decay, shapes, axes)
        optimizer = scaled(optimizer, trained.part(scales))
    plain = _plain(config, make_model, lambda params: optimizer.init(trained.part(params)))
    init = functools.partial(plain.start, None)
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(abstract, axes, rules, extra_axes=axes_of(extra), trained=trained)
    spec = batch_spec(config, objective, rules)
    step = with_rules(rules, functools.partial(
        train_step,
        graphdef=graphdef,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        accumulate_steps=config.train.accumulate_steps,
        trained=trained,
    ))  # fmt: skip
    evaluate = with_rules(
        rules, functools.partial(evaluation_step, graphdef=graphdef, objective=objective)
    )
    check_traces(config, objective, evaluate, abstract)
    batch_shardings = {name: s.sharding for name, s in spec.items()}
    return Program(
        graphdef=graphdef,
        plain=plain,
        objective=objective,
        optimizer=optimizer,
        trained=trained,
        mesh=mesh,
        rules=rules,
        abstract_state=abstract,
        state_shardings=shardings,
        batch_spec=spec,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, batch_shardings),
            out_shardings=(shardings, rules.replicated()),
            compiler_options=xla_flags.device_options(mesh.devices.flat[0].device_kind) or None,
        ),
        evaluate=jax.jit(evaluate, out_shardings=rules.replicated()),
    )


def _model_maker(config: RunConfig, platform: str) -> Callable[..., Model]:
    precision = Precision.on(
        platform,
        config.train.compute_dtype,
        matmul_dtype=config.train.matmul_dtype,
        reduce_dtype=config.train.reduce_dtype,
        attention_kernel=config.train.attention_kernel,
    )
    make = component("models", config.model.name).make
    return functools.partial(make, config.model, precision=precision)


def _abstract(make: Callable[[], Model]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, parameters, all else) of a model, in shapes alone."""
    return nnx.split(nnx.eval_shape(make), nnx.Param, ...)


def _plain(
    config: RunConfig, make_model: Callable[..., Model], init_optimizer: Callable[[Any], Any]
) -> Plain:
    def init(key: jax.Array) -> dict[str, Any]:
        model = make_model(rngs=nnx.Rngs(jax.random.split(key)[0]))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def start(params: dict[str, Any] | None, key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        model = make_model(rngs=nnx.Rngs(init_key))
        if params is not None:
            nnx.update(model, nnx.State(params))
        # Apart from the keys that the model takes from init_key.
        rngs = nnx.Rngs(jax.random.fold_in(init_key, 2**31 - 1))
        model = transformed(model, config.transforms, rngs)
        _, params, extra = nnx.split(model, nnx.Param, ...)
        params, extra = nnx.to_pure_dict(params), nnx.to_pure_dict(extra)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, extra, init_optimizer(params), run_key)

    _, params, _ = _abstract(lambda: make_model(rngs=nnx.Rngs(0)))
    return Plain(nnx.to_pure_dict(params), axes_of(params), init, start)


def axes_of(state: nnx.State) -> dict:
    """The LogicalAxes of each Variable as a nested dict; whole where it has none."""

    def axes(variable: nnx.Variable) -> nnx.Variable:
        names = variable.get_metadata().get("axes") or (None,) * variable.ndim
        return variable.replace(LogicalAxes(tuple(names)))

    named = jax.tree.map(axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(named)


def check_traces(
    config: RunConfig, objective: Objective, evaluate: Callable, abstract: TrainState
) -> None:
    """Traces the forward pass of a microbatch, so that what cannot run is said before any data is read.

    Raises:
      ConfigError: a kernel, a pipeline or a mixture of experts that does not fit model, mesh or backend;
        an eval.metric that evaluation does not give.
    """
    batch = objective.batch_spec(config.train.microbatch_size, config.data.sequence_length)
    try:
        metrics = jax.eval_shape(evaluate, abstract.params, abstract.extra, batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    metric = config.eval.metric
    # What tasks give is known when they have been asked.
    of_a_task = metric.partition("/")[0] in config.eval.labels
    if config.eval.patience is not None and metric not in metrics and not of_a_task:
        raise ConfigError(
            f"config.eval.metric = {metric!r}{nearest(metric, metrics)}; choices: {', '.join(metrics)}"
        )


def with_rules(rules: AxisRules, function: Callable) -> Callable:
    """`function`, traced with `constrain` acting on the mesh of `rules`."""

    @functools.wraps(function)
    def wrapped(*args):
        with use_rules(rules):
            return function(*args)

    return wrapped


def state_shardings(
    abstract: TrainState,
    axes: Any,
    rules: AxisRules,
    *,
    extra_axes: Any = None,
    trained: Trained = ALL,
) -> TrainState:
    """Parameters by the rules; optimizer state as its parameter, where the shapes agree.

    Args:
      extra_axes: LogicalAxes of `abstract.extra`; None: all of it is whole.

    Raises:
      ConfigError: a parameter that does not divide over the mesh.
    """
    whole = rules.replicated()
    part = jax.eval_shape(trained.part, abstract.params)
    try:
        params = shardings_for(abstract.params, axes, rules)
        moments = shardings_for(part, trained.axes(axes), rules.of_optimizer())
        extra = jax.tree.map(lambda _: whole, abstract.extra)
        if extra_axes is not None:
            extra = shardings_for(abstract.extra, extra_axes, rules)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    by_path = {
        _dict_suffix(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(part), jax.tree.leaves(moments), strict=True
        )
    }

    def like_its_parameter(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # Optimizers keep trees like the parameters' somewhere inside their state. Factored
        # statistics (Adafactor) have other shapes than their parameter and are small: whole.
        shape, sharding = by_path.get(_dict_suffix(path), (None, whole))
        return sharding if shape == leaf.shape else whole

    opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, abstract.opt_state)
    return TrainState(whole, params, extra, opt_state, whole)


def _dict_suffix(path: tuple) -> tuple[str, ...]:
    """The dict keys at the end of a path: the parameter's own path."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        keys.insert(0, entry.key)
    return tuple(keys)


def batch_spec(
    config: RunConfig, objective: Objective, rules: AxisRules
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the global batch.

    Raises:
      ConfigError: the rows of a microbatch do not divide over the mesh.
    """
    train, length = config.train, config.data.sequence_length
    try:
        for shape in objective.batch_spec(train.microbatch_size, length).values():
            batch_sharding(rules, shape.shape)
    except ValueError as error:
        raise ConfigError(
            f"config.train.batch_size {train.batch_size} / accumulate_steps "
            f"{train.accumulate_steps} = {train.microbatch_size} rows of {length}: {error}"
        ) from None
    return {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=batch_sharding(rules, s.shape))
        for name, s in objective.batch_spec(train.batch_size, length).items()
    }
