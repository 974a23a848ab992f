"""The experts of a mixture on a mesh: sort the tokens, exchange them, multiply, bring them back.

Tokens lie over every mesh axis of "batch" and "length"; the experts over that of "experts", of which
each device holds E / P. All of it is one shard_map. On a device with n tokens of k choices each:

1. The k * n choices are sorted by the shard that holds their expert. Choices come first by rank,
   then by token, so that where capacity ends, second choices go before first ones.
2. Each of the P shards gets a buffer of C = factor * k * n / P rows, and the buffers are exchanged;
   only the rows in use travel (`jax.lax.ragged_all_to_all`). CPU lacks that: there whole buffers do.
3. The P * C received rows are sorted by expert, multiplied (nn/kernels/grouped_matmul.py), sorted
   back, exchanged back, and summed by the weights of their choices.

Dropless without a worst-case buffer, which would hold P * n * min(k, E / P) rows: choices beyond C
go in further rounds of the same buffer. Their number, ceil(largest count / C), is agreed on by all
devices at run time; an even router needs none. The first round keeps its values for the backward
pass as usual; further ones keep nothing and are computed again. They stand under the name
OVERFLOW_ROUNDS, by which the planner knows them: it counts on an even router.

Every sort is a permutation known from both ends, so derivatives are gathers too, never scatters.

Weights enter as float32 shares and are cast, then gathered over "expert_embed", where they are used,
again in the backward pass: their gradients leave as float32 and are reduced as such.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm_jax.nn.kernels.grouped_matmul import grouped_gradient, grouped_matmul
from llm_jax.nn.mlp import activate
from llm_jax.nn.precision import Precision
from llm_jax.sharding.rules import AxisRules, active_rules

EXPERT_AXES = {
    "up": ("experts", "expert_embed", "mlp"),
    "gate": ("experts", "expert_embed", "mlp"),
    "down": ("experts", "mlp", "expert_embed"),
}
_TOKEN_AXES = ("batch", "length", None)
OVERFLOW_ROUNDS = "overflow_rounds"

Experts = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """factor: buffer of one shard over its even share; drops: drop what does not fit."""

    num_experts: int
    activation: str
    precision: Precision
    factor: float
    drops: bool


def run_experts(
    layer: ExpertLayer,
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    experts: Experts,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of each token's experts, on the active rules' mesh.

    Args:
      x: [B, T, D] in the compute dtype.
      choices: [B, T, k] int32, experts, different for one token; E where there is none.
      weights: [B, T, k] float32.
      experts: "up" and, where gated, "gate": [E, D, F], "down": [E, F, D], float32.

    Returns:
      [B, T, D] in the compute dtype, and the choices dropped, a float32 scalar.

    Raises:
      ValueError: a dimension does not divide over its mesh axes.
    """
    rules = active_rules()
    if rules is None or rules.mesh.size == 1:
        y, dropped = _on_shard(_Shard(layer), x, choices, weights, experts)
        return y[0], dropped
    rules.sharding(_TOKEN_AXES, x.shape, "tokens of a mixture of experts")
    for name, w in experts.items():
        rules.sharding(EXPERT_AXES[name], w.shape, f"experts' {name}")
    tokens = rules.spec(*_TOKEN_AXES)
    weight_specs = {name: rules.spec(*EXPERT_AXES[name]) for name in experts}
    y, dropped = jax.shard_map(
        functools.partial(_on_shard, _Shard.of(layer, rules)),
        mesh=rules.mesh,
        in_specs=(tokens, tokens, tokens, weight_specs),
        out_specs=(rules.spec("mlp", *_TOKEN_AXES), rules.spec()),
        check_vma=False,
    )(x, choices, weights, experts)
    # Each share of F gave a part of the sum. Added here, the compiler sees what comes next.
    return jax.lax.reduce(y, jnp.zeros((), y.dtype), jax.lax.add, (0,)), dropped


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A layer on one device: P shards of experts, and the mesh axes of what is shared."""

    layer: ExpertLayer
    count: int = 1
    experts: tuple[str, ...] = ()
    expert_embed: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ()

    @classmethod
    def of(cls, layer: ExpertLayer, rules: AxisRules) -> "_Shard":
        return cls(
            layer,
            rules.shares("experts"),
            rules.mesh_axes("experts"),
            rules.mesh_axes("expert_embed"),
            rules.mesh_axes("batch") + rules.mesh_axes("length"),
            tuple(rules.mesh.axis_names),
        )

    @property
    def num_experts(self) -> int:
        return self.layer.num_experts // self.count

    def worst_rows(self, n: int, k: int) -> int:
        """Rows that one device can have for one shard."""
        return n * min(k, self.num_experts)

    def rows(self, n: int, k: int) -> int:
        """C, a multiple of 8, the rows of a tile."""
        if self.count == 1:
            return n * k
        even = n * k / self.count
        return min(8 * -int(-self.layer.factor * even // 8), self.worst_rows(n, k))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Routes:
    """Where the choices of one device go; choice j * n + i is the jth of token i.

    expert: [k * n] of each choice, E where there is none.
    order:  [k * n] the choices, sorted by shard.
    place:  [k * n] of each choice among those of its shard.
    counts: [P] choices of each shard.
    """

    expert: jax.Array
    order: jax.Array
    place: jax.Array
    counts: jax.Array


def _routes(shard: _Shard, choices: jax.Array) -> _Routes:
    """choices: [n, k]. A lone shard is sorted by expert, and not again after the exchange."""
    expert = choices.T.reshape(-1)
    owner = expert // shard.num_experts
    order = jnp.argsort(expert if shard.count == 1 else owner, stable=True)
    own = owner[:, None] == jnp.arange(shard.count)
    counts = jnp.sum(own, 0, dtype=jnp.int32)
    starts = jnp.cumsum(counts) - counts
    place = jnp.argsort(order) - jnp.sum(jnp.where(own, starts, 0), -1)
    return _Routes(expert, order, place, counts)


def _on_shard(shard, x, choices, weights, experts):
    """Of one device: [1, b, t, D], a part of the sum where F is shared; all devices' drops."""
    b, t, k = choices.shape
    n, dim = b * t, x.shape[-1]
    routes = _routes(shard, choices.reshape(n, k))
    x, weights = x.reshape(n, dim), weights.reshape(n, k).T
    rows = shard.rows(n, k)
    dropped = jnp.zeros(())
    if shard.layer.drops or rows == shard.worst_rows(n, k):
        y = _round(shard, 0, routes, x, weights, experts)
    else:
        y = _all_rounds(shard, x, weights, experts, routes)
    if shard.layer.drops:
        dropped = jnp.sum(jnp.maximum(routes.counts - rows, 0)).astype(jnp.float32)
        dropped = jax.lax.psum(dropped, shard.tokens) if shard.tokens else dropped
    return y.astype(shard.layer.precision.dtype).reshape(1, b, t, dim), dropped


def _round(shard, index, routes, x, weights, experts):
    """Of the choices that the round sends, the weighted sum by token: [n, D] float32."""
    (n, dim), k, rows = x.shape, weights.shape[0], shard.rows(x.shape[0], weights.shape[0])
    none = k * n
    place, owner = routes.place - index * rows, routes.expert // shard.num_experts
    sent = (place >= 0) & (place < rows) & (owner < shard.count)
    row_of_choice = jnp.where(sent, owner * rows + place, shard.count * rows)

    starts = jnp.cumsum(routes.counts) - routes.counts
    place = index * rows + jnp.arange(rows)
    at = jnp.where(place < routes.counts[:, None], starts[:, None] + place, none).reshape(-1)
    choice_of_row = routes.order.at[at].get(mode="fill", fill_value=none)
    token_of_row = jnp.where(choice_of_row < none, choice_of_row % n, n)

    send = _take(x, token_of_row, row_of_choice.reshape(k, n).T)
    if shard.count == 1:
        own = routes.expert[:, None] == jnp.arange(shard.num_experts)
        out = _mlp(shard, send, experts, jnp.sum(own, 0, dtype=jnp.int32))
    else:
        expert = routes.expert.at[choice_of_row].get(mode="fill", fill_value=-1)
        out = _exchanged_mlp(shard, send, expert, experts)
    out = _take(out, row_of_choice, choice_of_row[:, None]).reshape(k, n, dim)
    # Choice by choice: over so few, a reduction takes longer than the sums on CPU.
    return sum(w[:, None] * y.astype(jnp.float32) for w, y in zip(weights, out, strict=True))


def _exchanged_mlp(shard, send, expert, experts):
    """The experts' output for rows of this device: [P * C, D]; expert: [P * C], -1 where empty."""
    local = jnp.where(expert < 0, shard.num_experts, expert % shard.num_experts)
    sending = jnp.sum(expert.reshape(shard.count, -1) >= 0, -1, dtype=jnp.int32)
    local = _all_to_all(shard, local)
    receiving = jnp.sum(local.reshape(shard.count, -1) < shard.num_experts, -1, dtype=jnp.int32)
    order = jnp.argsort(local, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.sum(local[:, None] == jnp.arange(shard.num_experts), 0, dtype=jnp.int32)
    rows = _exchange(shard, send, sending, receiving)
    out = _mlp(shard, _take(rows, order, back[:, None]), experts, sizes)
    return _exchange(shard, _take(out, back, order[:, None]), receiving, sending)


def _mlp(shard, rows, experts, sizes):
    """rows: [M, D], sorted by expert."""
    up = _product(shard, 1, rows, experts["up"], sizes)
    gate = _product(shard, 1, rows, experts["gate"], sizes) if "gate" in experts else None
    return _product(shard, 2, activate(shard.layer.activation, up, gate), experts["down"], sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(shard, x, weights, experts, routes):
    """The sum of `_round` over as many rounds as there are rows for."""
    return _all_rounds_forward(shard, x, weights, experts, routes)[0]


def _all_rounds_forward(shard, x, weights, experts, routes):
    inputs = (x, weights, experts)
    first = functools.partial(_round, shard, 0, routes)
    y, backward = jax.vjp(first, *inputs)
    add = lambda i, y: y + _round(shard, i, routes, *inputs)  # noqa: E731
    return _further_rounds(shard, x, weights, routes, add, y), (backward, inputs, routes)


def _all_rounds_backward(shard, residuals, g):
    """The first round first: what it kept is let go before the others are computed again."""
    backward, inputs, routes = residuals

    def add(i, sums):
        _, backward = jax.vjp(functools.partial(_round, shard, i, routes), *inputs)
        return jax.tree.map(lambda s, d: s + d.astype(jnp.float32), sums, backward(g))

    sums = jax.tree.map(lambda d: d.astype(jnp.float32), backward(g))
    sums = _further_rounds(shard, *inputs[:2], routes, add, sums)
    return *jax.tree.map(lambda s, a: s.astype(a.dtype), sums, inputs), None


_all_rounds.defvjp(_all_rounds_forward, _all_rounds_backward)


@jax.named_scope(OVERFLOW_ROUNDS)
def _further_rounds(shard, x, weights, routes, add, sums):
    """`sums` after add(i, sums) of every round but the first.

    There are as many on all devices, since a round is an exchange among them.
    """
    rows = shard.rows(x.shape[0], weights.shape[0])
    num_rounds = jax.lax.pmax(-(-jnp.max(routes.counts) // rows), shard.mesh)
    return jax.lax.fori_loop(1, num_rounds, add, sums)


@jax.custom_vjp
def _take(x, index, back):
    """x[index], zero where the index is beyond x: [R, D] to [S, D].

    index: [S]; back: [R, J], the places in `index` of each row of x, beyond S where there is none.
    """
    return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x, index, back):
    return _take(x, index, back), back


def _take_backward(back, g):
    rows = (g.at[at].get(mode="fill", fill_value=0).astype(jnp.float32) for at in back.T)
    return sum(rows).astype(g.dtype), None, None


_take.defvjp(_take_forward, _take_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(shard, embed, rows, w, sizes):
    """Rows times the matrix of their expert; `embed` is the dimension of w that is gathered."""
    return grouped_matmul(shard.layer.precision, rows, _gather(shard, embed, w), sizes)


def _product_forward(shard, embed, rows, w, sizes):
    return _product(shard, embed, rows, w, sizes), (rows, w, sizes)


def _product_backward(shard, embed, residuals, g):
    rows, w, sizes = residuals
    full, precision = _gather(shard, embed, w), shard.layer.precision
    dx = grouped_matmul(precision, g, full, sizes, transposed=True).astype(rows.dtype)
    dw = grouped_gradient(precision, rows, g, sizes)
    if shard.expert_embed:
        dw = jax.lax.psum_scatter(dw, shard.expert_embed, scatter_dimension=embed, tiled=True)
    return dx, dw, None


_product.defvjp(_product_forward, _product_backward)


def _gather(shard, embed, w):
    precision = shard.layer.precision
    if not shard.expert_embed:
        # The loop on CPU casts what it reads: a matrix of one expert, not a copy of all.
        return w if precision.wide_output else precision.cast(w)
    return jax.lax.all_gather(precision.cast(w), shard.expert_embed, axis=embed, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(shard, rows, sending, receiving):
    """Buffer p to shard p: [P * C, D], of which the first sending[p] rows of buffer p are in use."""
    if shard.layer.precision.wide_output:
        return _all_to_all(shard, rows)
    # One by one under vmap: its own batching refuses offsets that are not batched.
    run = jax.custom_batching.sequential_vmap(functools.partial(_ragged_exchange, shard))
    return run(rows, sending, receiving)


def _ragged_exchange(shard, rows, sending, receiving):
    capacity = rows.shape[0] // shard.count
    starts = capacity * jnp.arange(shard.count, dtype=jnp.int32)
    own = jnp.full_like(starts, capacity * jax.lax.axis_index(shard.experts))
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros_like(rows), starts, sending, own, receiving, axis_name=shard.experts
    )


def _exchange_forward(shard, rows, sending, receiving):
    return _exchange(shard, rows, sending, receiving), (sending, receiving)


def _exchange_backward(shard, residuals, g):
    sending, receiving = residuals
    return _exchange(shard, g, receiving, sending), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _all_to_all(shard, rows):
    parts = rows.reshape(shard.count, -1, *rows.shape[1:])
    return jax.lax.all_to_all(parts, shard.experts, 0, 0).reshape(rows.shape)
