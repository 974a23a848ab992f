"""One optimizer step: merge, loss, gradient, update. Pure, so it compiles anywhere."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llm_jax.core.types import Batch, Objective, Weighted
from llm_jax.optim.freeze import ALL, Trained
from llm_jax.sharding.rules import active_rules, use_rules
from llm_jax.training.state import TrainState
from llm_jax.transforms import drawn

Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate_steps: int,
    trained: Trained = ALL,
) -> tuple[TrainState, Metrics]:
    """The next state and scalar float32 metrics of this step."""
    key = jax.random.fold_in(state.key, state.step)
    grads, loss, metrics = gradients(
        state.params,
        state.extra,
        batch,
        key,
        graphdef=graphdef,
        objective=objective,
        accumulate_steps=accumulate_steps,
        trained=trained,
    )
    # Sums until here: dividing once by the whole weight makes microbatches equal one big batch.
    grads = jax.tree.map(lambda g: g / jnp.maximum(loss.weight, 1.0), grads)
    with jax.named_scope("optimizer"):
        part = trained.part(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        params = trained.joined(optax.apply_updates(part, updates), state.params)
    report = {name: value.mean for name, value in {"loss": loss, **metrics}.items()}
    report |= {
        "grad_norm": optax.global_norm(grads),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "target_tokens": loss.weight,
    }
    state = TrainState(state.step + 1, params, state.extra, opt_state, state.key)
    return state, report


def gradients(
    params: Any,
    extra: Any,
    batch: Batch,
    key: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    objective: Objective,
    accumulate_steps: int = 1,
    trained: Trained = ALL,
) -> tuple[Any, Weighted, dict[str, Weighted]]:
    """(gradient of the summed loss by what is trained, loss, metrics) of a batch, as sums."""

    def loss_sum(part: Any, batch: Batch, key: jax.Array):
        whole = trained.joined(part, params)
        model = drawn(nnx.merge(graphdef, nnx.State(whole), nnx.State(extra)), key)
        output = objective.loss(model, batch, key=key, train=True)
        return output.loss.sum, (output.loss, output.metrics)

    def gradient(part: Any, batch: Batch, key: jax.Array):
        (_, aux), grads = jax.value_and_grad(loss_sum, has_aux=True)(part, batch, key)
        return grads, aux

    part = trained.part(params)
    if accumulate_steps == 1:
        grads, (loss, metrics) = gradient(part, batch, key)
    else:
        grads, (loss, metrics) = accumulate(gradient, part, batch, key, accumulate_steps)
    return grads, loss, metrics


def accumulate(gradient, params: Any, batch: Batch, key: jax.Array, num: int):
    """Sums gradient, loss and metrics over `num` microbatches of interleaved rows.

    Row b of a device's rows goes to microbatch b % num: each device keeps an equal share of every
    microbatch, and nothing moves between devices.

    Where copies of the parameters each see their own rows (mesh axis "data"), every copy adds up its
    own gradients, as a row of a `vmap` over the copies, and the copies meet once, after the last
    microbatch. Gradients of shares of the parameters (fsdp) are reduced for each microbatch: to keep
    them whole until the end would take the memory that fsdp saves. Each copy draws its own dropout.
    """
    rules = active_rules()
    axes = rules.copy_axes() if rules else ()
    if not axes:
        return _microbatches(gradient, params, batch, key, num)
    copies = math.prod(rules.mesh.shape[a] for a in axes)
    rows = {name: x.reshape(copies, -1, *x.shape[1:]) for name, x in batch.items()}
    with use_rules(dataclasses.replace(rules.without(axes), copies="copies")):
        per_copy = jax.vmap(
            lambda batch, key: _microbatches(gradient, params, batch, key, num),
            axis_name="copies",
            spmd_axis_name=axes,
        )(rows, jax.random.split(key, copies))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), per_copy)


def _microbatches(gradient, params, batch, key, num):
    split = lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    micro = jax.tree.map(split, dict(batch))

    def body(total, item):
        index, rows = item
        return jax.tree.map(
            jnp.add, total, gradient(params, rows, jax.random.fold_in(key, index))
        ), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradient, params, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(num), micro))
    return total


def evaluation_step(
    params: Any, extra: Any, batch: Batch, *, graphdef: nnx.GraphDef, objective: Objective
) -> dict[str, Weighted]:
    """The objective's sums on a batch, without dropout."""
    model = nnx.merge(graphdef, nnx.State(params), nnx.State(extra))
    output = objective.loss(model, batch, key=None, train=False)
    return {"loss": output.loss, **output.metrics}
