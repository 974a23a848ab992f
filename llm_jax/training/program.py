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

from llm_jax.core.config import ConfigError, component
from llm_jax.core.types import Batch, Model, Objective
from llm_jax.nn.precision import Precision
from llm_jax.optim.make import make_optimizer
from llm_jax.optim.schedule import make_schedule
from llm_jax.sharding import xla_flags
from llm_jax.sharding.mesh import make_rules
from llm_jax.sharding.place import batch_sharding
from llm_jax.sharding.rules import AxisRules, logical_axes, shardings_for, use_rules
from llm_jax.training.config import RunConfig
from llm_jax.training.state import TrainState
from llm_jax.training.step import Metrics, evaluation_step, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """abstract_state: TrainState of ShapeDtypeStructs; state_shardings: the same tree of shardings.

    batch_spec: shapes of the global batch with their shardings. init, step and evaluate are jitted;
    step donates the state it is given.
    """

    graphdef: nnx.GraphDef
    objective: Objective
    optimizer: optax.GradientTransformation
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
        return sum(x.size for x in jax.tree.leaves(self.abstract_state.params))


def build_program(config: RunConfig, mesh: Mesh) -> Program:
    """Puts model, objective and optimizer together for a mesh.

    Raises:
      ConfigError: sizes that do not divide over the mesh; names parameter, axis, size and rule.
    """
    rules = make_rules(config.mesh, mesh)
    precision = Precision.on(
        mesh.devices.flat[0].platform,
        config.train.compute_dtype,
        matmul_dtype=config.train.matmul_dtype,
        reduce_dtype=config.train.reduce_dtype,
        attention_kernel=config.train.attention_kernel,
    )
    make_model = functools.partial(
        component("models", config.model.name).make, config.model, precision=precision
    )
    objective = component("objectives", config.objective.name).make(config.objective)
    graphdef, params, _ = nnx.split(
        nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    axes = logical_axes(params)
    schedule = make_schedule(config.schedule, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, axes)

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        _, params, extra = nnx.split(make_model(rngs=nnx.Rngs(init_key)), nnx.Param, ...)
        params, extra = nnx.to_pure_dict(params), nnx.to_pure_dict(extra)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, extra, optimizer.init(params), run_key)

    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(abstract, axes, rules)
    spec = batch_spec(config, objective, rules)
    step = with_rules(rules, functools.partial(
        train_step,
        graphdef=graphdef,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        accumulate_steps=config.train.accumulate_steps,
    ))  # fmt: skip
    evaluate = with_rules(
        rules, functools.partial(evaluation_step, graphdef=graphdef, objective=objective)
    )
    check_traces(config, objective, evaluate, abstract)
    batch_shardings = {name: s.sharding for name, s in spec.items()}
    return Program(
        graphdef=graphdef,
        objective=objective,
        optimizer=optimizer,
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


def check_traces(
    config: RunConfig, objective: Objective, evaluate: Callable, abstract: TrainState
) -> None:
    """Traces the forward pass of a microbatch, so that what cannot run is said before any data is read.

    Raises:
      ConfigError: a kernel, a pipeline or a mixture of experts that does not fit model, mesh or backend.
    """
    batch = objective.batch_spec(config.train.microbatch_size, config.data.sequence_length)
    try:
        jax.eval_shape(evaluate, abstract.params, abstract.extra, batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def with_rules(rules: AxisRules, function: Callable) -> Callable:
    """`function`, traced with `constrain` acting on the mesh of `rules`."""

    @functools.wraps(function)
    def wrapped(*args):
        with use_rules(rules):
            return function(*args)

    return wrapped


def state_shardings(abstract: TrainState, axes: Any, rules: AxisRules) -> TrainState:
    """Parameters by the rules; optimizer state as its parameter, where the shapes agree.

    Raises:
      ConfigError: a parameter that does not divide over the mesh.
    """
    try:
        params = shardings_for(abstract.params, axes, rules)
        moments = shardings_for(abstract.params, axes, rules.of_optimizer())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    whole = rules.replicated()
    by_path = {
        _dict_suffix(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract.params),
            jax.tree.leaves(moments),
            strict=True,
        )
    }

    def like_its_parameter(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # Optimizers keep trees like the parameters' somewhere inside their state. Factored
        # statistics (Adafactor) have other shapes than their parameter and are small: whole.
        shape, sharding = by_path.get(_dict_suffix(path), (None, whole))
        return sharding if shape == leaf.shape else whole

    opt_state = jax.tree_util.tree_map_with_path(like_its_parameter, abstract.opt_state)
    extra = jax.tree.map(lambda _: whole, abstract.extra)
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
