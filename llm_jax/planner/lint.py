"""Communication and memory that nobody asked for: what a sharding mistake looks like once compiled.

The partitioner never fails: where layouts disagree it inserts collectives. The strategy (the mesh and
the rules, sharding/rules.py) says which ones belong to a step:

| mesh axis               | belongs there                                                        |
|-------------------------|----------------------------------------------------------------------|
| fsdp (expert, context)  | a layer's parameters gathered in it, gradients reduced               |
| data                    | gradients reduced                                                    |
| tensor                  | activations summed; with rules "sequence" gathered and scattered too |
| context                 | keys and values gathered by attention                                |
| pipeline                | activations handed on, the batch spread before and after, and all    |
|                         | layers of a stage gathered at once                                   |
| any                     | what code asks for by name (`all_gather`, `ppermute`, ...)           |

Everything else is found here, as is what should have been in shares or in chunks.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_jax.nn.losses import CHUNK_BYTES, MIN_CHUNK_TOKENS
from llm_jax.planner import words
from llm_jax.planner.collectives import Namer, exchanges_of
from llm_jax.planner.compiled import Argument, CompiledStep
from llm_jax.planner.hlo_text import Instruction, array_bytes
from llm_jax.planner.memory import head_shapes, vocabulary_sizes
from llm_jax.planner.plan import Exchange, Finding, Roofline
from llm_jax.planner.source import in_stack, module_of
from llm_jax.sharding.rules import DEFAULT_RULES

MIB = 2**20
# Bytes per device from which a replicated parameter, and any communication, is worth a word.
LARGE_PARAMETER = 64 * MIB
WORTH_A_WORD = MIB
# Forward, rematerialized and backward, and one that the compiler may add to save memory. A mixture of
# experts has code for further rounds of its exchange, which seldom runs.
MOST_GATHERS, MOST_GATHERS_OF_MIXTURE = 4, 8
_WEIGHTS = ("parameter", "extra")
_SHARING = ("fsdp", "expert", "context", "tensor")
# Primitives by which code asks for communication: the partitioner names its own after other ones.
_EXPLICIT = {"all_gather", "all_to_all", "ppermute", "psum", "psum2", "psum_invariant", "pmax",
             "pmin", "ragged_all_to_all", "reduce_scatter", "psum_scatter", "pbroadcast",
             "all_gather_invariant", "pshuffle"}  # fmt: skip
# Config keys that give the size of a logical axis.
_SIZES = {"embed": "embed_dim", "expert_embed": "embed_dim", "vocab": "vocab_size", "mlp": "mlp_dim",
          "heads": "num_heads", "kv_heads": "num_kv_heads"}  # fmt: skip
_NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call",
              "conditional", "opt-barrier", "after-all", "iota"}  # fmt: skip


def lint(namer: Namer, roofline: Roofline | None) -> tuple[Finding, ...]:
    """What is accidental in a step, the most expensive first.

    Args:
      namer: of the step.
      roofline: with named exchanges (collectives.name_exchanges); None where there is no time to tell,
        then the findings carry bytes alone.
    """
    facts = _Facts(namer, exchanges_of(namer) if roofline is None else roofline.exchanges)
    findings = [
        *_whole_gathers(facts),
        *_repeated_gathers(facts),
        *_replicated(facts),
        *_reshardings(facts),
        *_logits(facts),
        *_emulated_scatters(facts),
    ]
    return tuple(sorted(findings, key=lambda f: (f.kind == "note", -f.seconds, -f.bytes)))


@dataclasses.dataclass(frozen=True)
class _Facts:
    namer: Namer
    exchanges: tuple[Exchange, ...]

    @property
    def step(self) -> CompiledStep:
        return self.namer.step

    @functools.cached_property
    def mesh(self) -> Mapping[str, int]:
        return {axis.name: axis.size for axis in self.step.mesh}

    @functools.cached_property
    def weights(self) -> frozenset[tuple[int, ...]]:
        """Shapes of parameters, in order of size."""
        whole = (a.shape for a in self.step.arguments if a.kind in _WEIGHTS)
        return head_shapes(self.step) | {tuple(sorted(shape)) for shape in whole}

    def setting(self, section: str, key: str, default: Any) -> Any:
        return (self.step.config.get(section) or {}).get(key, default)

    @property
    def microbatches(self) -> int:
        return self.setting("train", "accumulate_steps", 1)

    def parameters_of(self, exchange: Exchange) -> Iterator[tuple[Argument, Sequence[int], int]]:
        """(parameter, gathered shape, bytes) of each weight that an exchange gathers for use."""
        if exchange.kind not in ("all-gather", "all-reduce"):
            return
        for one in self.namer.served(exchange.name, exchange.op_name):
            if one.role == "parameter" and one.argument is not None and not one.updated:
                yield one.argument, one.shape, one.bytes


def _whole_gathers(facts: _Facts) -> Iterator[Finding]:
    """Parameters of all layers gathered at once, before or outside the loop over layers."""
    unroll, stages = facts.setting("model", "scan_unroll", 1), facts.mesh.get("pipeline", 1)
    for exchange in facts.exchanges:
        for argument, shape, size in facts.parameters_of(exchange):
            layers = _layers_in(facts, argument, shape, exchange)
            # A pipeline gathers its stage's layers once for all microbatches: see nn/pipeline.py.
            at_once = _stacked(argument) // stages if stages > 1 else unroll
            if layers <= max(1, at_once):
                continue
            yield Finding(
                kind="gather",
                text=(
                    f"{argument.path} is gathered over {exchange.axes} for {layers} layers at once "
                    f"({words.size(size)} per device, {_count(exchange.times)}): outside its layer all of "
                    "it is in memory"
                ),
                source=exchange.source,
                bytes=size,
                seconds=exchange.exposed * exchange.times,
            )


def _repeated_gathers(facts: _Facts) -> Iterator[Finding]:
    """Parameters gathered more often than passes need them."""
    if facts.mesh.get("pipeline", 1) > 1:  # each turn of a pipeline gathers its layers
        return
    mixture = facts.setting("model", "experts", None) is not None
    most = MOST_GATHERS_OF_MIXTURE if mixture else MOST_GATHERS
    gathered: dict[str, list] = collections.defaultdict(list)
    for exchange in facts.exchanges:
        for argument, shape, size in facts.parameters_of(exchange):
            layers = max(1, _layers_in(facts, argument, shape, exchange))
            gathered[argument.path].append((argument, exchange, layers * exchange.times, size))
    for path, gathers in gathered.items():
        argument = gathers[0][0]
        runs = sum(runs for _, _, runs, _ in gathers)
        per_pass = runs / (_stacked(argument) or 1) / facts.microbatches
        size = max(size for *_, size in gathers)
        if per_pass <= most or size < WORTH_A_WORD:
            continue
        worst = max((exchange for _, exchange, _, _ in gathers), key=lambda e: e.times)
        yield Finding(
            kind="gather",
            text=(
                f"{path} is gathered {per_pass:.0f} times per microbatch over {worst.axes} "
                f"({words.size(size)} each): twice, or three times with rematerialization, would do"
            ),
            source=worst.source,
            bytes=size,
            seconds=sum(e.exposed * e.times for _, e, _, _ in gathers),
        )


def _replicated(facts: _Facts) -> Iterator[Finding]:
    """Large parameters that are whole over mesh axes that could hold them in shares."""
    asked = ("fsdp", "expert", "context") if facts.setting("mesh", "rules", "") == "zero1" else ()
    for argument in facts.step.arguments:
        if argument.kind not in _WEIGHTS or argument.bytes < LARGE_PARAMETER:
            continue
        used = {axis for axes in argument.spec for axis in axes}
        free = [
            a for a in _SHARING if facts.mesh.get(a, 1) > 1 and a not in used and a not in asked
        ]
        chosen = [(axis, place) for axis in free if (place := _place_for(facts, argument, axis))]
        if not chosen:
            continue
        with_state = argument.bytes + sum(
            other.bytes
            for other in facts.step.arguments
            if other.kind == "optimizer"
            and other.shard_shape == argument.shard_shape
            and other.path.endswith("." + argument.path.partition(".")[2])
        )
        ways = " or ".join(
            f"{axis}={facts.mesh[axis]} could share dimension {dimension} ({argument.shape[dimension]}"
            + (f'): rule "{name}" -> "{axis}"' if name else f'): a rule for it -> "{axis}"')
            for axis, (dimension, name) in chosen
        )
        yield Finding(
            kind="replicated",
            text=(
                f"{argument.path} {argument.dtype}{list(argument.shape)} is whole over "
                f"{'+'.join(axis for axis, _ in chosen)}: {words.size(argument.bytes)} on each device"
                + (
                    f", {words.size(with_state)} with its optimizer state"
                    * (with_state > argument.bytes)
                )
                + f"; {ways}"
            ),
            source=facts.namer.source_of(argument),
            bytes=with_state,
        )


def _place_for(facts: _Facts, argument: Argument, axis: str) -> tuple[int, str] | None:
    """(dimension, logical axis or "") that a mesh axis could share: as the rules have it, or the longest."""
    first = 1 if _stacked(argument) else 0
    fits = [
        d
        for d in range(first, len(argument.shape))
        if argument.shard_shape[d] % facts.mesh[axis] == 0
    ]
    model = facts.step.config.get("model") or {}
    for name, key in _SIZES.items():
        targets = DEFAULT_RULES[name]
        if axis in ((targets,) if isinstance(targets, str) else targets):
            found = [d for d in fits if argument.shape[d] == model.get(key)]
            if found:
                return found[-1], name
    return (max(fits, key=lambda d: argument.shard_shape[d]), "") if fits else None


def _reshardings(facts: _Facts) -> Iterator[Finding]:
    """Activations that the partitioner moves because two layouts disagree."""
    groups: dict[tuple, list[Exchange]] = collections.defaultdict(list)
    for exchange in facts.exchanges:
        if exchange.bytes >= WORTH_A_WORD and not _belongs(facts, exchange):
            groups[exchange.kind, exchange.axes, exchange.tensor].append(exchange)
    for (kind, axes, tensor), members in groups.items():
        largest = max(members, key=lambda e: e.bytes)
        shapes = facts.namer.served(largest.name, largest.op_name)
        arrays = " ".join(f"{one.dtype}{list(one.shape)}" for one in shapes[:2])
        passes = " and ".join(dict.fromkeys(e.direction for e in members))
        yield Finding(
            kind="resharding",
            text=(
                f"activation of {tensor} {arrays} goes through {kind} over {axes} in the {passes} "
                f"pass, {_count(sum(e.times for e in members))}, {words.size(largest.bytes)} each: the "
                "strategy asks for none, so two layouts (constrain, or a rule) disagree there"
            ),
            source=largest.source,
            bytes=largest.bytes,
            seconds=sum(e.exposed * e.times for e in members),
        )


def _belongs(facts: _Facts, exchange: Exchange) -> bool:
    """Whether the strategy asks for an exchange; see the table at the top."""
    if exchange.role != "activation" or exchange.direction == "optimizer":
        return True
    if exchange.op_name.rpartition("/")[2] in _EXPLICIT:
        return True
    axes = set(exchange.axes.split("+"))
    if "pipeline" in axes or exchange.tensor.startswith("batch."):
        return True
    if axes == {"context"} and re.search(r"\battention\b", exchange.tensor):
        return True
    if exchange.kind in ("all-reduce", "reduce-scatter"):
        # Over axes that share the batch, only sums over tokens belong: those of an einsum that gives
        # tokens mean that the weights stayed in shares.
        gives = re.findall(r"->(\w+)", exchange.op_name)
        return axes == {"tensor"} or not gives or not {"b", "t"} <= set(gives[-1])
    in_sequence = facts.setting("mesh", "rules", "") == "sequence"
    return in_sequence and axes == {"tensor"} and exchange.kind == "all-gather"


def _logits(facts: _Facts) -> Iterator[Finding]:
    """Logits of all tokens of a microbatch in memory at once, where chunks would do."""
    share = min(vocabulary_sizes(facts.step), default=0)
    limit = max(CHUNK_BYTES, MIN_CHUNK_TOKENS * share * 4)
    shares = math.prod(
        facts.mesh.get(a, 1) for a in ("data", "fsdp", "expert", "pipeline", "context")
    )
    tokens = facts.step.tokens_per_step // facts.microbatches // shares
    largest: tuple[int, str, Instruction] | None = None
    for one in _written(facts):
        for dtype, shape in one.shapes:
            size = array_bytes(dtype, shape)
            if size > max(limit, largest[0] if largest else 0) and _is_logits(
                facts, one, dtype, shape, tokens
            ):
                largest = size, f"{dtype}{list(shape)}", one
    if largest is None:
        return
    size, name, one = largest
    yield Finding(
        kind="logits",
        text=(
            f"logits {name} of all tokens are in memory at once ({words.size(size)} per device): "
            f"nn/losses.head_loss makes loss and gradient in chunks of {words.size(limit)}"
        ),
        source=facts.namer.sources.of_attributes(one.attributes),
        bytes=size,
    )


def _written(facts: _Facts) -> Iterator[Instruction]:
    """Instructions whose results are arrays in memory, not values within a fusion."""
    graph = facts.namer.graph
    inside = {
        name
        for number, names in graph.called.items()
        if graph.nodes[number].opcode == "fusion"
        for name in names
    }
    for node in graph.nodes:
        if node.computation not in inside and node.opcode not in _NO_BUFFER:
            yield node.instruction


def _is_logits(
    facts: _Facts, one: Instruction, dtype: str, shape: Sequence[int], tokens: int
) -> bool:
    ids = vocabulary_sizes(facts.step).intersection(shape)
    if not ids or dtype not in ("f32", "bf16", "f16") or math.prod(shape) // min(ids) < tokens:
        return False
    if in_stack(module_of(one.op_name)):  # as many tokens or features as words
        return False
    sides = {tuple(sorted(n for n in shape if n > 1)), tuple(sorted((min(ids), tokens)))}
    # As many tokens as the model is wide: only the einsum tells logits from the head's weights.
    return not sides & facts.weights or re.search(r"->\w*t\w*v", one.op_name) is not None


def _emulated_scatters(facts: _Facts) -> Iterator[Finding]:
    """Gradients summed whole of which a device keeps its share."""
    found: dict[str, list[tuple[Exchange, str, int]]] = collections.defaultdict(list)
    for exchange in facts.exchanges:
        axes = set(exchange.axes.split("+"))
        for one in facts.namer.served(exchange.name, exchange.op_name):
            kept = {a for part in one.argument.spec for a in part} if one.argument else set()
            if exchange.kind == "all-reduce" and one.role == "gradient" and kept & axes:
                found[exchange.axes].append((exchange, one.name, one.bytes))
    for axes, parts in found.items():
        names = list(dict.fromkeys(name for _, name, _ in sorted(parts, key=lambda p: -p[2])))
        seconds = sum(e.exposed * e.times for e in {id(e): e for e, _, _ in parts}.values())
        more = f" +{len(names) - 3} more" if len(names) > 3 else ""
        total = sum(size * e.times for e, _, size in parts)
        if total < WORTH_A_WORD:
            continue
        yield Finding(
            kind="note",
            text=(
                f"gradients of {', '.join(names[:3])}{more} are all-reduced over {axes} and cut "
                f"afterwards ({words.size(total)} per step): the compiler's own choice on these links, a "
                "reduce-scatter would move half"
            ),
            source=parts[0][0].source,
            seconds=seconds / 2,
        )


def _layers_in(facts: _Facts, argument: Argument, shape: Sequence[int], exchange: Exchange) -> int:
    """How many layers' worth of a stacked parameter an array holds; 0 where it is not stacked."""
    if not _stacked(argument):
        return 0
    gathered = set(exchange.axes.split("+"))
    left = {a for axes in argument.spec[1:] for a in axes} - gathered
    layer = math.prod(argument.shape[1:]) / math.prod(facts.mesh.get(a, 1) for a in left)
    return round(math.prod(shape) / layer)


def _stacked(argument: Argument) -> int:
    """The layers of a stacked parameter, else 0."""
    return argument.shape[0] if ".layers." in argument.path and len(argument.shape) > 1 else 0


def _count(times: int) -> str:
    return "once per step" if times == 1 else f"{times} times per step"
