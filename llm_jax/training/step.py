"""One optimizer step: merge, loss, gradient, update. Pure, so it compiles anywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llm_jax.core.types import Batch, Objective, Weighted
from llm_jax.training.state import TrainState

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
) -> tuple[TrainState, Metrics]:
    """The next state and scalar float32 metrics of this step."""
    key = jax.random.fold_in(state.key, state.step)

    def loss_sum(params: Any, batch: Batch, key: jax.Array):
        model = nnx.merge(graphdef, nnx.State(params), nnx.State(state.extra))
        output = objective.loss(model, batch, key=key, train=True)
        return output.loss.sum, (output.loss, output.metrics)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)
    if accumulate_steps == 1:
        (_, (loss, metrics)), grads = gradient(state.params, batch, key)
    else:
        grads, (loss, metrics) = accumulate(gradient, state.params, batch, key, accumulate_steps)

    # Sums until here: dividing once by the whole weight makes microbatches equal one big batch.
    grads = jax.tree.map(lambda g: g / jnp.maximum(loss.weight, 1.0), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    report = {name: value.mean for name, value in {"loss": loss, **metrics}.items()}
    report |= {
        "grad_norm": optax.global_norm(grads),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "target_tokens": loss.weight,
    }
    state = TrainState(state.step + 1, params, state.extra, opt_state, state.key)
    return state, report


def accumulate(gradient, params: Any, batch: Batch, key: jax.Array, num: int):
    """Sums gradient, loss and metrics over `num` microbatches of interleaved rows.

    Row b goes to microbatch b % num: each device then keeps an equal share of every microbatch of
    the rows it already has, and nothing moves between devices.
    """
    split = lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    micro = jax.tree.map(split, dict(batch))

    def body(total, item):
        index, rows = item
        (_, aux), grads = gradient(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (grads, aux)), None

    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: (lambda out: (out[1], out[0][1]))(gradient(params, first, key))),
    )
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(num), micro))
    return total


def evaluation_step(
    params: Any, extra: Any, batch: Batch, *, graphdef: nnx.GraphDef, objective: Objective
) -> dict[str, Weighted]:
    """The objective's sums on a batch, without dropout."""
    model = nnx.merge(graphdef, nnx.State(params), nnx.State(extra))
    output = objective.loss(model, batch, key=None, train=False)
    return {"loss": output.loss, **output.metrics}
