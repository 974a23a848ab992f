"""Time of a training step by arithmetic, without a compiler.

- Matmuls and attention take their FLOPs at a share of the chip's peak; what is between them takes its
  bytes at the memory's rate. The two do not overlap.
- A collective takes its bytes at the rate of the links that its mesh axes cover (links.py). Gathers of
  weights hide behind the layer's computing where the compiler lets them, sums over the network behind the
  backward pass; all others stand exposed.

The shares are the same for all chips and models. Steps of gpt_1b come within 20 % of their compiled plans
on v5e, v5p, v6e and tpu7x, sharded or with tensor=4; two small mixtures of experts on v5e, whose rows take
more time to sort and lay out than to multiply, within 15 %. What a pipeline copies in its turns is counted
in part only: its steps can take twice the time and more. Good for ranking meshes of a kind, not for promises.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from llm_jax.core.flops import keys_seen
from llm_jax.nn.moe import MoeConfig
from llm_jax.planner.chips import Chip, matmul_flops
from llm_jax.planner.footprint import Block, element_size, tokens_at_once
from llm_jax.planner.hlo_collectives import Collective
from llm_jax.planner.links import Crossing
from llm_jax.planner.links import seconds as link_seconds
from llm_jax.planner.placement import Placement, Weight
from llm_jax.planner.plan import Roofline
from llm_jax.planner.stacks import StackShape
from llm_jax.training.config import RunConfig
from llm_jax.training.speed import flops_per_token

MATMUL_EFFICIENCY = 0.85
# Softmax runs on the vector unit between two products; a head narrower than the matrix unit wastes the rest.
ATTENTION_EFFICIENCY = 0.5
# What each exchange of a mixture's rows costs beside its links, in operations of the vector unit for a byte:
# libtpu zeroes and relays them for `ragged-all-to-all` in tiles of two rows. From its cycles for v5e. A
# GPU writes and reads the rows as often as nn/experts.py sorts them.
_SORT_OPERATIONS = 430
_SORT_PASSES = 4
# Chips on which gathers of weights run beside products: as libtpu 0.0.42 and XLA for GPUs schedule them.
HIDES_GATHERS = ("v5e", "tpu7x")

# Policies under which the backward pass computes products of the block, and attention, again.
_PRODUCTS_AGAIN = ("attention", "full", "offload")
_ATTENTION_AGAIN = ("dots", "full", "offload")
# Of attention's forward FLOPs: two kernels in the backward pass, with 3 and 4 products to the forward's 2.
_ATTENTION_BACKWARD = 3.5
# And 5 products in the plain one (nn/kernels/reference.py).
_PLAIN_BACKWARD = 2.5


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of a step over `axes`. bytes: whole array of one of them; times: in a step.

    hides_behind: seconds of computing beside each.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    times: float
    hides_behind: float = 0.0


def pace(run: RunConfig, placement: Placement) -> Roofline | None:
    """None where the chip's rates are not known, or the model is not of a family that counts FLOPs."""
    chip = placement.target.chip
    full, causal = (flops_per_token(run, causal_half=half) for half in (False, True))
    if None in (chip.peak_flops, chip.hbm_bytes_per_second, full):
        return None
    bounds: dict[str, float] = collections.defaultdict(float)
    flops, compute = _compute_seconds(run, placement, chip)
    bounds["compute"] = compute
    bounds["memory"] = _memory_seconds(run, placement, chip)
    bounds["other"] = _sorting_seconds(run, placement, chip)
    for traffic in exchanges(run, placement, compute):
        once = seconds_of(traffic, placement)
        name = "communication " + "+".join(traffic.axes)
        bounds[name] += traffic.times * max(0.0, once - traffic.hides_behind)
    step = sum(bounds.values())
    tokens = run.train.batch_size * run.data.sequence_length
    rate = tokens / placement.target.num_chips / step
    return Roofline(
        step_seconds=step,
        bounds={name: value for name, value in bounds.items() if value > 0},
        ops=(),
        exchanges=(),
        tokens_per_second=rate,
        model_flops=full * tokens / placement.target.num_chips,
        hardware_flops=flops,
        mfu=rate * full / chip.peak_flops,
        mfu_causal=rate * causal / chip.peak_flops,
        efficiency=MATMUL_EFFICIENCY,
        from_compiler=0.0,
    )


def _tokens_of_chip(run: RunConfig, placement: Placement, length: int) -> float:
    """Tokens of a step that a chip's devices work on, with so many of a row.

    Shares of "tensor" work on the same ones.
    """
    once = tokens_at_once(run, placement, length) * run.train.accumulate_steps
    return once * placement.target.devices_per_chip


def _compute_seconds(run: RunConfig, placement: Placement, chip: Chip) -> tuple[float, float]:
    """(FLOPs of a step on a chip, their seconds)."""
    # A stage runs its share of the layers on the tokens of all stages, in every turn.
    in_layers = placement.turns_per_item * placement.shares("stage")
    matmul = 0.0
    for weight in placement.weights:
        tokens = _tokens_of_chip(run, placement, weight.length)
        flops = 2 * tokens * weight.layers * weight.work
        if weight is placement.head:
            matmul += weight.passes * flops
        elif weight.kind == "block":
            again = weight.stacked and _is_again(weight, run.model.remat)
            matmul += (weight.passes + again) * flops * in_layers
        elif weight.kind == "expert":
            mlp = placement.stacks[0].transformer.mlp
            chosen = mlp.experts_per_token / mlp.num_experts * placement.shares("experts")
            again = _is_again(weight, run.model.remat)
            matmul += (weight.passes + again) * flops * in_layers * chosen
    attention = 0.0
    for stack in placement.stacks:
        tokens = _tokens_of_chip(run, placement, stack.length)
        config = stack.transformer.attention
        heads = config.num_heads / placement.shares("heads")
        backward = _PLAIN_BACKWARD if stack.is_plain else _ATTENTION_BACKWARD
        passes = 1 + backward + (run.model.remat in _ATTENTION_AGAIN)
        scores = 4 * heads * config.head_dim * _keys_of_layers(stack)
        attention += scores * tokens * placement.turns_per_item * passes
    filled = min(1.0, config.head_dim / (chip.mxu or 1))
    seconds = matmul / MATMUL_EFFICIENCY + attention / (ATTENTION_EFFICIENCY * filled)
    return matmul + attention, seconds / matmul_flops(chip, run.train.compute_dtype)


def _keys_of_layers(stack: StackShape) -> float:
    """Keys that a token meets in all layers of a stack. The plain kernel computes those it hides, too."""
    config, length = stack.transformer, stack.length
    if stack.is_plain:
        return config.num_layers * (length + stack.memory)
    whole = config.num_layers // config.period if config.local else 0
    seen = [keys_seen(length, spec.window, spec.causal) for spec, _ in config.kinds]
    return (
        (config.num_layers - whole) * seen[0]
        + whole * seen[-1]
        + (config.num_layers * stack.memory)
    )


def _is_again(weight: Weight, policy: str) -> bool:
    """Whether the backward pass multiplies by a layer's weight again, besides for the gradients.

    Never by the last of the MLP, whose product the next layer's input holds.
    """
    if weight.kind == "expert":
        return policy != "none"
    if weight.axes[-2:] == ("mlp", "embed"):
        return False
    return policy in _PRODUCTS_AGAIN or (policy == "narrow" and "mlp" in weight.axes)


def _memory_seconds(run: RunConfig, placement: Placement, chip: Chip) -> float:
    """What lies between products, as far as it is not fused into them; weights, state, logits."""
    size, steps = element_size(run), run.train.accumulate_steps
    activations = weights = state = 0.0
    for stack in placement.stacks:
        block, tokens = (
            Block.of(run, placement, stack),
            _tokens_of_chip(run, placement, stack.length),
        )
        depth = stack.transformer.num_layers * placement.turns_per_item
        # What is kept is put into stacks of all layers and taken out of them, twice each.
        moved = 6 * block.at_work(size) + 4 * block.kept(run.model.remat, size)
        activations += tokens * depth * moved
    embed = stack.transformer.embed_dim
    # A pipeline's stage reads its layers and adds to their gradients in every turn.
    runs = steps * placement.turns / run.mesh.pipeline_rounds
    for weight in placement.weights:
        moved = weight.layers * weight.work * (3 * size + 2 * 4)
        weights += moved * (runs if weight.stacked else steps)
        state += 4 * weight.share * weight.trained
        if weight is placement.head:
            predicted = _tokens_of_chip(run, placement, placement.head_length)
            activations += predicted * 4 * 4 * weight.work / embed
    if placement.turns > 1:
        # And the arrays of all its microbatches, going in and coming out, once in each pass.
        whole = tokens / steps * placement.shares("stage") * embed * size
        weights += runs * 3 * 2 * 2 * whole
    devices = placement.target.devices_per_chip
    state += 2 * placement.optimizer_bytes
    total = activations + devices * (weights + state)
    return total / chip.hbm_bytes_per_second


def _sorting_seconds(run: RunConfig, placement: Placement, chip: Chip) -> float:
    """Of what surrounds the exchanges of a mixture's rows, whole buffers of them."""
    stack = placement.stacks[0]
    config, experts = stack.transformer, stack.transformer.mlp
    if not isinstance(experts, MoeConfig) or not placement.held["experts"]:
        return 0.0
    factor = experts.capacity_factor or experts.round_factor
    rows = _tokens_of_chip(run, placement, stack.length) * experts.experts_per_token * factor
    moved = rows * config.embed_dim * element_size(run) * _row_exchanges(run)
    moved *= config.num_layers * placement.turns_per_item
    if chip.kind == "tpu" and chip.vector_flops:
        return moved * _SORT_OPERATIONS / chip.vector_flops
    return moved * _SORT_PASSES / chip.hbm_bytes_per_second


def _row_exchanges(run: RunConfig) -> int:
    """Of a layer, to the experts and back, in both passes and again where the forward one is."""
    return 4 if run.model.remat == "none" else 6


def exchanges(run: RunConfig, placement: Placement, compute_seconds: float) -> Iterator[Traffic]:
    """The collectives of a step."""
    yield from _weights_exchanged(run, placement, compute_seconds)
    yield from _gradients_of_copies(run, placement, compute_seconds)
    for stack in placement.stacks:
        yield from _activations_exchanged(run, placement, stack)


def _weights_exchanged(run, placement, compute_seconds) -> Iterator[Traffic]:
    """Gathers in both passes and the gradients' sums, in every microbatch."""
    size, steps = element_size(run), run.train.accumulate_steps
    summed = 2 if run.train.reduce_dtype == "bfloat16" else 4
    pipeline = placement.shares("stage") > 1
    groups: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for weight in placement.weights:
        if weight.gathered_over:
            table = weight.kind == "embedding"
            stacked = weight.stacked
            # A pipeline gathers all layers of a stage at once, once; the table is looked up in float32.
            layers = weight.layers if stacked and pipeline else 1
            key = (weight.gathered_over, 1 if pipeline else weight.layers, stacked and not pipeline)
            groups[key][0] += layers * weight.work * (4 if table else size)
            reduced = weight.trained if weight.passes < 3 else 1
            groups[key][1] += layers * weight.work * (summed if stacked else 4) * reduced
    for (axes, layers, again), (gathered, reduced) in groups.items():
        hidden = 0.0
        if placement.target.chip.kind == "gpu" or placement.target.chip.name in HIDES_GATHERS:
            hidden = compute_seconds / steps / layers / 4 if again else 0.0
        runs = steps * layers
        yield Traffic("all-gather", axes, gathered, runs * (2 if again else 1), hidden)
        yield Traffic(_reduction(placement, axes), axes, reduced, runs)


def _reduction(placement: Placement, axes: Sequence[str]) -> str:
    """libtpu turns a reduce-scatter over several dimensions of the torus into an all-reduce."""
    spans = [span for name in axes for span in placement.axes[name].spans if span.kind == "link"]
    chip = placement.target.chip
    return "all-reduce" if chip.kind == "tpu" and chip.devices == 1 and len(spans) > 1 else (
        "reduce-scatter"
    )  # fmt: skip


def _gradients_of_copies(run, placement, compute_seconds) -> Iterator[Traffic]:
    """Sums over copies of the parameters, once a step; with whole parameters, the new ones' gather.

    Over the network they run beside the backward pass (sharding/xla_flags.py), unless microbatches add
    up first.
    """
    shares: dict[tuple[str, ...], float] = collections.defaultdict(float)
    for weight in placement.weights:
        shares[weight.copied_over] += weight.share * weight.trained
    for axes, size in shares.items():
        slow = any(s.kind == "network" for name in axes for s in placement.axes[name].spans)
        hides = slow and run.train.accumulate_steps == 1
        if axes:
            yield Traffic("all-reduce", axes, size, 1, compute_seconds / 2 if hides else 0.0)
    if run.mesh.rules == "zero1":
        axes = placement.rules.of_optimizer().mesh_axes("embed")
        if axes:
            updated = sum(w.share * w.trained for w in placement.weights)
            yield Traffic("all-gather", axes, updated, 1)


def _activations_exchanged(
    run: RunConfig, placement: Placement, stack: StackShape
) -> Iterator[Traffic]:
    """What layers exchange of their tokens, which nothing hides."""
    size, config, held = element_size(run), stack.transformer, placement.held
    steps, tokens = run.train.accumulate_steps, tokens_at_once(run, placement, stack.length)
    again = run.model.remat in _PRODUCTS_AGAIN
    layers = steps * config.num_layers * placement.turns_per_item
    hidden = tokens * config.embed_dim * size
    tensor, context = held["heads"], held["length"]
    if tensor:
        sums = 6 + 2 * again if config.cross_attention else 4 + again
        yield Traffic("all-reduce", tensor, hidden, layers * sums + 2 * steps)
    if context:
        heads = config.attention.num_kv_heads / placement.shares("kv_heads")
        pairs = 2 * tokens * placement.shares("length") * heads * config.attention.head_dim * size
        yield Traffic("all-gather", context, pairs, layers * (2 + again))
        yield Traffic("reduce-scatter", context, pairs, layers)
    experts = held["experts"]
    if experts and isinstance(config.mlp, MoeConfig):
        rows = hidden * config.mlp.experts_per_token
        yield Traffic("all-to-all", experts, rows, layers * _row_exchanges(run))
    stages = held["stage"]
    if stages:
        sent = (
            hidden * placement.shares("stage") * run.mesh.pipeline_rounds * placement.turns_per_item
        )
        yield Traffic("collective-permute", stages, sent, 2 * steps)


def seconds_of(traffic: Traffic, placement: Placement) -> float:
    """Of one collective by itself."""
    spans = tuple(span for name in traffic.axes for span in placement.axes[name].spans)
    one = Collective(traffic.kind, int(traffic.bytes), None, 1, (), "", (), False)
    return link_seconds(one, Crossing("+".join(traffic.axes), spans), placement.target.chip)
