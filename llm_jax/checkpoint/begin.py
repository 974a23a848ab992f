"""The state that a run begins with: its newest checkpoint > `init_from` > random parameters."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from llm_jax.checkpoint.manager import Checkpointer, tree_differences
from llm_jax.checkpoint.source import Source
from llm_jax.core.config import ConfigError
from llm_jax.core.paths import flat, is_head, pick
from llm_jax.core.types import Model
from llm_jax.data.pipeline import Loader
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules, path_name, shardings_for
from llm_jax.training.config import RunConfig, changes_since
from llm_jax.training.loop import Outcome
from llm_jax.training.program import Program
from llm_jax.training.state import TrainState
from llm_jax.training.stopping import Stopping

Say = Callable[[str], None]


def restore_or_init(
    run: RunConfig, program: Program, loader: Loader, checkpointer: Checkpointer, say: Say
) -> tuple[TrainState, Stopping | None]:
    """The newest checkpoint's state, with the loader set to go on from it; else a new state."""
    restored = checkpointer.restore_latest(program.abstract_state, program.state_shardings)
    if restored is None:
        return init(run, program, say), None
    state, saved = restored
    loader.set_state(saved.loader)
    stopping = Stopping.saved(saved.stopping, run.eval)
    say(f"resuming after step {int(state.step)}")
    if stopping is not None and stopping.is_over(run.eval):
        say(f"training ended early, step {stopping.step} being the best: nothing is left to train")
    elif int(state.step) >= run.train.num_steps:
        say(f"train.num_steps is {run.train.num_steps}: nothing is left to train")
    for line in changes_since(saved.config, run):
        say(f"changed since that checkpoint: {line}")
    return state, stopping


def final_model(
    outcome: Outcome, program: Program, checkpointer: Checkpointer, say: Say
) -> tuple[Model, int]:
    """The model that a run ends with, and its step: the best one where that was looked for."""
    state, step, best = outcome.state, int(outcome.state.step), outcome.best_step
    if best is not None and best != step:
        if best in checkpointer.steps():
            say(f"step {best} was the best and is used")
            arrays = checkpointer.restore_params(best, _placed(program))
            state, step = dataclasses.replace(state, **arrays), best
        else:
            say(f"the checkpoint of the best step, {best}, is gone: step {step} is used")
    return program.model(state), step


def _placed(program: Program) -> dict[str, Any]:
    return {
        name: jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            getattr(program.abstract_state, name),
            getattr(program.state_shardings, name),
        )
        for name in ("params", "extra")
    }


def init(run: RunConfig, program: Program, say: Say) -> TrainState:
    """A new state.

    Raises:
      ConfigError: `init_from` cannot be read, or is not this model.
    """
    key = jax.random.key(run.train.seed)
    if run.init_from is None:
        return program.init(key)
    plain, rules = program.plain, _rules_to_load(program)
    shardings = shardings_for(plain.shapes, plain.axes, rules)
    found = flat(Source.parse(run.init_from).load(run, plain, rules))
    fresh = [path for path in flat(plain.shapes) if path not in found and is_head(path)]
    _check(run, program, found, fresh)
    say(f"beginning with the parameters of {run.init_from}")
    if fresh:
        say(f"not in there, so random: {', '.join(fresh)}")
        make = jax.jit(
            lambda key: pick(plain.init(key), fresh), out_shardings=pick(shardings, fresh)
        )
        found |= flat(make(key))
    unused = [path for path in found if path not in flat(plain.shapes)]
    if unused:
        say(f"in there, but not in this model: {', '.join(unused)}")
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: found.pop(path_name(path)), plain.shapes
    )
    if rules is not program.rules:
        return jax.device_put(jax.jit(plain.start)(params, key), program.state_shardings)
    start = jax.jit(plain.start, donate_argnums=0, out_shardings=program.state_shardings)
    with warnings.catch_warnings():
        # Of what a transform quantizes, the memory cannot serve for the state.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return start(params, key)


def _check(run: RunConfig, program: Program, found: Mapping[str, Any], fresh: list[str]) -> None:
    wanted = {p: x for p, x in flat(program.plain.shapes).items() if p not in fresh}
    differences = tree_differences(wanted, {p: x for p, x in found.items() if p in wanted})
    if differences:
        raise ConfigError(
            f"config.init_from {run.init_from} does not fit config.model: {'; '.join(differences)}"
        )
    trained = flat(jax.eval_shape(program.trained.part, program.abstract_state.params))
    for path in fresh:
        if not any(f"{name}.".startswith(f"{path}.") for name in trained):
            raise ConfigError(
                f"{path} is not in config.init_from {run.init_from}, so it begins random, and it is "
                "frozen: take it out of optimizer.freeze, or name it in transforms.lora.full"
            )


def _rules_to_load(program: Program) -> AxisRules:
    """Those of the program; one CPU where the loaded model takes more memory than the state has.

    So that a model which is quantized to fit its device need not be on it before that. Several processes
    have it in shares, and could not hand arrays of their own to each other.
    """
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    state = program.abstract_state
    fits = size(program.plain.shapes) <= size((state.params, state.extra))
    if fits or jax.process_count() > 1:
        return program.rules
    try:
        return AxisRules(make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1]))
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return program.rules
