"""Pipeline parallelism over stacked layers: a circular schedule of microbatches (Narayanan et al. 2021).

With P stages, R rounds and M microbatches the L layers are cut into R * P groups of L / (R * P). Stage p
holds groups p, P + p, 2P + p, ... At time t it runs item t - p: microbatch (t - p) mod M in round
(t - p) div M. The whole takes R * M + P - 1 turns, of which P - 1 find no work: the bubble is
(P - 1) / (R * M + P - 1).

All stages are one `vmap` whose axis lies over the mesh axis of "stage"; handing on is a roll along that
axis, which the compiler turns into a permutation among neighbours. So what is inside a stage stays
under the control of the compiler, and fsdp, tensor, context and expert axes work in it as outside.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.sharding.rules import AxisRules, constrain, use_rules

# layer(params, index, x, rows, microbatch) -> (x, sums): one layer on one microbatch.
Layer = Callable[[Any, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


def count_microbatches(rules: AxisRules, num_layers: int, batch_size: int) -> int:
    """M: what the mesh asks for, or as many as divide the rows, up to four for every stage.

    Raises:
      ValueError: layers or rows that the schedule does not fit; names the nearest that works.
    """
    stages, schedule = rules.shares("stage"), rules.pipeline
    _check_layers(stages, schedule.rounds, num_layers)
    rows = batch_size // rules.within_pipeline().shares("batch")
    fits = [n for n in range(stages, rows + 1) if rows % n == 0]
    wanted = schedule.microbatches
    if not fits:
        raise ValueError(
            f"mesh.pipeline {stages} needs at least {stages} rows in each share of the batch, and there "
            f"are {rows}: use a larger train.batch_size, or fewer shares"
        )
    if wanted is None:
        return max([n for n in fits if n <= 4 * stages], default=fits[0])
    if wanted not in fits:
        nearest = f"the nearest that works is {min(fits, key=lambda n: abs(n - wanted))}"
        raise ValueError(
            f"mesh.microbatches {wanted} must be at least mesh.pipeline {stages} and divide the "
            f"{rows} rows of each share of the batch; {nearest}"
        )
    return wanted


def _check_layers(stages: int, rounds: int, num_layers: int) -> None:
    possible = [
        n
        for n in range(1, num_layers // stages + 1)
        if num_layers % (stages * n) == 0 and (stages % n == 0 or n % stages == 0)
    ]
    if rounds not in possible:
        hint = (
            f"rounds that work: {', '.join(map(str, possible))}"
            if possible
            else f"mesh.pipeline must divide {num_layers}"
        )
        raise ValueError(
            f"mesh.pipeline_rounds {rounds} x mesh.pipeline {stages} must divide {num_layers} layers, "
            f"and one of the two the other; {hint}"
        )


def bubble(rules: AxisRules, microbatches: int) -> float:
    """The share of its time that a stage waits."""
    stages = rules.shares("stage")
    return (stages - 1) / (rules.pipeline.rounds * microbatches + stages - 1)


def run_pipeline(
    layer: Layer, params: nnx.State, x: jax.Array, rows: Any, rules: AxisRules
) -> tuple[jax.Array, Any]:
    """Passes x through all layers.

    Args:
      layer: one layer; traced under the rules within a pipeline.
      params: of all layers, [L, ...] each.
      x: [B, T, D].
      rows: a tree of [B, T, ...], what each layer wants to know of the rows it gets.

    Returns:
      x: [B, T, D]; and the sums of all layers, [L, ...] each, which must be sums over rows.
    """
    num_layers = jax.tree.leaves(params)[0].shape[0]
    micro = count_microbatches(rules, num_layers, x.shape[0])
    inside = rules.within_pipeline()
    copies = _copy_axes(params, inside)
    with use_rules(inside):
        groups = _dealt(params, rules, copies)  # [C, R, P, k, ...]
        x, rows = (
            jax.tree.map(lambda a: _of_copies(a, inside, copies), tree) for tree in (x, rows)
        )

    def run(groups, x, rows):
        x, rows = (jax.tree.map(lambda a: _split(a, micro), tree) for tree in (x, rows))
        x, sums = _turns(layer, groups, x, rows, rules)
        return constrain(_join(x), "batch", "residual_length", "activation_embed"), sums

    with use_rules(inside.without(copies)):
        x, sums = jax.vmap(run, spmd_axis_name=copies or None)(groups, x, rows)
    x = x.reshape(-1, *x.shape[2:])
    with use_rules(inside):
        x = constrain(x, "batch", "residual_length", "activation_embed")
    sums = jax.tree.map(lambda a: jnp.sum(a, 0).reshape(num_layers, *a.shape[4:]), sums)
    return constrain(x, "batch", "residual_length", "activation_embed"), sums


def _copy_axes(params: nnx.State, rules: AxisRules) -> tuple[str, ...]:
    """The mesh axes over which all weights lie whole while the pipeline runs.

    Each place along them has a copy, as a row of a `vmap`, and adds up its own gradient. The copies
    meet once, after the last turn, instead of in every turn.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    taken = {axis for v in leaves for name in v.axes for axis in rules.gathered().mesh_axes(name)}
    return tuple(axis for axis in rules.mesh_axes("batch") if axis not in taken)


def _of_copies(a, rules, copies):
    """[B, T, ...] to [C, B / C, T, ...], the rows of each copy."""
    a = constrain(a, "batch", "length", *(None,) * (a.ndim - 2))
    count = math.prod(rules.mesh.shape[axis] for axis in copies)
    return a.reshape(count, -1, *a.shape[1:])


def _turns(layer, groups, x, rows, rules):
    """x: [M, b, T, D]. Returns the same after all rounds, and the sums as [R, P, k, ...]."""
    stages, micro, rounds = rules.shares("stage"), x.shape[0], rules.pipeline.rounds
    depth = jax.tree.leaves(groups)[0].shape[2]
    stage = jnp.arange(stages)

    def run_stage(params, first, x, rows, microbatch):
        def body(x, item):
            index, params = item
            return layer(params, index, x, rows, microbatch)

        return jax.lax.scan(body, x, (first + jnp.arange(depth), params))

    everywhere = jax.vmap(run_stage, spmd_axis_name=rules.mesh_axes("stage")[0])

    def turn(carry, t):
        state, stored, total = carry
        item = t - stage
        current, microbatch = jnp.clip(item // micro, 0, rounds - 1), item % micro
        arriving = jnp.where(t < micro, x[:, t % micro], stored[:, t % micro])
        state = jnp.where((stage == 0)[:, None, None, None], arriving, state)
        state = _pin(state)
        params = jax.tree.map(lambda w: _of_round(w, current), groups)
        mine = jax.tree.map(lambda a: a[microbatch], rows)
        first = (current * stages + stage) * depth
        y, sums = everywhere(params, first, state, mine, microbatch)
        valid = (item >= 0) & (item < rounds * micro)
        at = (jnp.arange(rounds)[:, None] == current) & valid  # [R, P]
        total = jax.tree.map(lambda a, s: a + _spread(at, s) * s[None], total, sums)
        state = _pin(jnp.roll(y, 1, axis=0))
        stored = stored.at[:, (t - (stages - 1)) % micro].set(state)
        return (state, stored, total), None

    zeros = _pin(jnp.zeros((stages, *x.shape[1:]), x.dtype))
    # A row for every stage, though only the first one reads it: its gradient then needs no sum over
    # the stages in every turn.
    x = jnp.broadcast_to(x, (stages, *x.shape))
    x, stored = (
        constrain(a, "stage", None, "batch", "residual_length", "activation_embed")
        for a in (x, jnp.zeros_like(x))
    )
    shapes = jax.eval_shape(
        everywhere, jax.tree.map(lambda w: w[0], groups), stage, zeros,
        jax.tree.map(lambda a: a[:1].repeat(stages, 0), rows), stage,
    )[1]  # fmt: skip
    total = jax.tree.map(lambda s: jnp.zeros((rounds, *s.shape), s.dtype), shapes)
    turns = jnp.arange(rounds * micro + stages - 1)
    (_, stored, total), _ = jax.lax.scan(turn, (zeros, stored, total), turns)
    return stored[0], total


def _pin(state):
    return constrain(state, "stage", "batch", "residual_length", "activation_embed")


def _of_round(w, current):
    """The weights that each stage needs now: w [R, P, k, ...], current [P], to [P, k, ...]."""
    if w.shape[0] == 1:
        return w[0]
    return jax.vmap(lambda of_stage, r: of_stage[r], in_axes=(1, 0))(w, current)


def _spread(at, like):
    return at.reshape(*at.shape, *(1,) * (like.ndim - 1)).astype(like.dtype)


def _split(a, micro):
    """[B, T, ...] to [M, B / M, T, ...]: interleaved, so that each device keeps rows it has."""
    rest = (None,) * (a.ndim - 2)
    a = constrain(a, "batch", "length", *rest)
    a = a.reshape(a.shape[0] // micro, micro, *a.shape[1:]).swapaxes(0, 1)
    return constrain(a, None, "batch", "length", *rest)


def _join(a):
    return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])


def _dealt(params: nnx.State, rules: AxisRules, copies: tuple[str, ...]) -> nnx.State:
    """[L, ...] in shares over the stages to [C, R, P, k, ...], group r * P + p on stage p.

    Weights are made whole over the axes that share the batch here, once for all microbatches.
    """
    whole = rules.gathered()
    count = math.prod(rules.mesh.shape[axis] for axis in copies)

    def deal(variable):
        value, axes = variable[...], variable.axes
        stages, rounds = rules.shares("stage"), rules.pipeline.rounds
        with use_rules(whole):
            value = constrain(value, *axes)
        if rounds > 1:
            spec = whole.spec(*axes)
            value = jax.shard_map(
                lambda w: _exchange(w, stages, rounds, rules.mesh_axes("stage")[0]),
                mesh=rules.mesh, in_specs=spec, out_specs=spec, check_vma=False,
            )(value)  # fmt: skip
        # Stage-major now: [P, R, k, ...].
        value = value.reshape(stages, rounds, -1, *value.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(copies or None, *whole.spec(None, "stage", None, *axes[1:]))
        value = jnp.broadcast_to(value, (count, *value.shape))
        value = jax.lax.with_sharding_constraint(value, NamedSharding(rules.mesh, spec))
        return variable.replace(value)

    return jax.tree.map(deal, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _exchange(w, stages, rounds, axis):
    """This stage's layers in order, [L / P, ...], to those of its groups in the order of rounds.

    Stage p has groups p * R + j and needs r * P + p. Groups move in R permutations of the stages.
    """
    groups = w.reshape(rounds, -1, *w.shape[1:])
    out = jnp.zeros_like(groups)
    stage = jax.lax.axis_index(axis)
    for turn in range(rounds):
        sent = [_sent_group(p, turn, stages, rounds) for p in range(stages)]
        moves = [(p, (p * rounds + j) % stages) for p, j in enumerate(sent)]
        arrives = {to: (p * rounds + sent[p]) // stages for p, to in moves}
        piece = groups[jnp.array(sent)[stage]]
        piece = jax.lax.ppermute(piece, axis, moves)
        out = out.at[jnp.array([arrives[p] for p in range(stages)])[stage]].set(piece)
    return out.reshape(w.shape)


def _sent_group(stage: int, turn: int, stages: int, rounds: int) -> int:
    """Which of its R groups a stage sends in this turn, so that no two go to the same stage."""
    if stages % rounds == 0:
        return (turn + stage // (stages // rounds)) % rounds
    return turn // stages * stages + (turn + stage) % stages
