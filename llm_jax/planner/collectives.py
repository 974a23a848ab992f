"""What each collective serves: the parameter it gathers, the gradient it sums, the activation it moves.

A gathered weight is followed back to the argument that it is a copy of, a gradient forward to the
parameter that it updates; see graph.py. Where the way ends in a product it is an activation, named by the
module and the einsum of its source.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from llm_jax.planner.compiled import Argument, CompiledStep
from llm_jax.planner.graph import Graph, Value, graph_of, kind_of, num_arrays, result_shapes
from llm_jax.planner.hlo import analyse
from llm_jax.planner.hlo_text import array_bytes
from llm_jax.planner.links import axes_of
from llm_jax.planner.plan import Exchange, Roofline
from llm_jax.planner.source import Sources, direction_of, module_of

# Sums of losses and counts, and norms: a handful of numbers.
SCALAR_ELEMENTS = 16
MOST_NAMES = 3
# How far metadata is looked for where an instruction has none.
MOST_STEPS = 64
_REDUCES = ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Served:
    """One array of a collective. dtype, shape: of its result on one device, in HLO's names.

    name: a parameter's path, a batch key or a module; argument: the parameter's, None of others.
    updated: what is gathered is the parameter's next value (ZeRO stage 1), not the one at work.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    argument: Argument | None = None
    updated: bool = False

    @property
    def bytes(self) -> int:
        return array_bytes(self.dtype, self.shape)


def name_exchanges(roofline: Roofline, namer: "Namer") -> Roofline:
    """The roofline with tensor and role of each exchange.

    Also the source and the direction, where the compiler merged or dropped what they are read from.
    """
    named = tuple(namer.named(exchange) for exchange in roofline.exchanges)
    return dataclasses.replace(roofline, exchanges=named)


def exchanges_of(namer: "Namer") -> tuple[Exchange, ...]:
    """The named exchanges of a step on devices whose links nobody knows, without seconds."""
    step, graph, plain = namer.step, namer.graph, []
    for one in analyse(step.hlo).collectives:
        start = graph.nodes[graph.by_name[one.name]].instruction
        plain.append(
            Exchange(
                name=one.name,
                kind=one.kind,
                axes=axes_of(one, step.mesh),
                bytes=one.bytes,
                sent_bytes=one.sent_bytes,
                times=one.times,
                seconds=0.0,
                exposed=0.0,
                tensor="",
                role="other",
                direction=direction_of(one.op_name),
                source=namer.sources.of_attributes(start.attributes),
                op_name=one.op_name,
            )
        )
    return tuple(namer.named(exchange) for exchange in plain)


class Namer:
    """Follows the collectives and the arguments of one step, which has a program's text."""

    def __init__(self, step: CompiledStep):
        self.step = step
        self.graph: Graph = graph_of(step.hlo)
        self.sources = Sources(step.hlo)
        by_name = {argument.name: argument for argument in step.arguments}
        # Arguments that the step does not use are no parameters of the compiled program.
        self.arguments = {
            number: by_name[name]
            for number, name in self.graph.argument_names().items()
            if name in by_name
        }
        self.parameters = {a.path: a for a in step.arguments if a.kind == "parameter"}
        self.frozen = {a.path: a for a in step.arguments if a.kind == "extra"}
        self._by_shape = _by_shape([*self.parameters.values(), *self.frozen.values()])
        self._known: dict[tuple[str, str], tuple[Served, ...]] = {}

    def named(self, exchange: Exchange) -> Exchange:
        served = self.served(exchange.name, exchange.op_name)
        if not served:
            return dataclasses.replace(exchange, tensor=_module(exchange.op_name), role="other")
        source, op_name, direction = exchange.source, exchange.op_name, exchange.direction
        if not source or not op_name or _is_argument(op_name):
            attributes, near = self._nearest(self.graph.collectives_of(exchange.name)[0])
            source = source or self.sources.of_attributes(attributes)
            if not op_name or _is_argument(op_name):
                op_name, direction = near or op_name, direction_of(near)
        largest = max(served, key=lambda one: one.bytes)
        if largest.role == "gradient" and direction != "optimizer":
            direction = "backward"  # merged with sums of the forward pass, it may say that instead
        return dataclasses.replace(
            exchange,
            tensor=_joined(served),
            role=largest.role,
            direction="optimizer" if largest.updated else direction,
            source=source,
            op_name=op_name,
        )

    def served(self, name: str, op_name: str = "") -> tuple[Served, ...]:
        """Each array of the collectives of an instruction; () where there is no such.

        op_name: of one of them, where an instruction holds several.
        """
        if (name, op_name) not in self._known:
            numbers = _unchained(self.graph, self.graph.collectives_of(name))
            alike = [n for n in numbers if self.graph.nodes[n].instruction.op_name == op_name]
            self._known[name, op_name] = tuple(
                self._serve(number, place)
                for number in alike or numbers
                for place in range(num_arrays(self.graph.nodes[number]))
            )
        return self._known[name, op_name]

    def source_of(self, argument: Argument) -> str:
        """The line where its module first uses an argument in the forward pass, or else another that does.

        Of what the optimizer keeps for a parameter, the parameter's.
        """
        argument = self.parameters.get(self._parameter_of(argument), argument)
        module = argument.path.split(".")[1:-1]
        numbers = [number for number, one in self.arguments.items() if one == argument]
        left = collections.deque((self.graph.parameters[self.graph.entry][n], ()) for n in numbers)
        seen, forward, elsewhere = set(left), "", ""
        while left and len(seen) < 16 * MOST_STEPS:
            value = left.popleft()
            users = [user for user, _ in self.graph.users[value[0]]]
            for one in (self.graph.nodes[number].instruction for number in users):
                place = self.sources.of_attributes(one.attributes)
                elsewhere = elsewhere or place
                if place and direction_of(one.op_name) == "forward":
                    if module_of(one.op_name).split(".")[: len(module)] == module:
                        return place
                    forward = forward or place
            after = [one for one in self.graph.after(*value) if one not in seen]
            left.extend(after)
            seen.update(after)
        return forward or elsewhere

    def _serve(self, number: int, place: int) -> Served:
        node = self.graph.nodes[number]
        kind, shapes = kind_of(node), result_shapes(node)
        dtype, shape = shapes[min(place, len(shapes) - 1)]
        operand: Value = (node.operands[place], ())
        op_name = self._nearest(number, place)[1]

        def make(name, role, argument=None, *, updated=False):
            return Served(name, role, dtype, shape, argument, updated)

        if math.prod(shape) <= SCALAR_ELEMENTS:
            return make(_module(op_name), "scalar")
        origins = self.graph.origins(operand)
        sources = [self.arguments[n] for n in sorted(origins.arguments) if n in self.arguments]
        kinds = {source.kind for source in sources}
        if kinds and kinds <= {"parameter", "extra"} and not origins.computed:
            argument = sources[0] if len(sources) == 1 else None
            return make("+".join(s.path for s in sources[:2]), "parameter", argument)
        updated = self._updated(number, place)
        if updated:
            next_value = kind == "all-gather" and "optimizer" in kinds
            return make(
                "+".join(one.path for one in updated[:2]),
                "parameter" if next_value else "gradient",
                updated[0] if len(updated) == 1 else None,
                updated=next_value,
            )
        if kinds and kinds <= {"batch", "other"} and not origins.computed:
            return make("+".join(s.path for s in sources[:2]), "activation")
        guessed = self._by_shape.get(_dimensions(shape), ())
        # What is frozen has no update: a transform makes the gradients of other parameters from its own.
        certain = len(guessed) == 1 or {one.kind for one in guessed} == {"extra"}
        if certain and kind in _REDUCES and _sums_weights(op_name):
            name = "+".join(one.path for one in guessed[:2])
            return make(name, "gradient", guessed[0] if len(guessed) == 1 else None)
        return make(_module(op_name), "activation")

    def _updated(self, number: int, place: int) -> list[Argument]:
        """The parameters that a collective's result takes part in the update of."""
        node = self.graph.nodes[number]
        several = (place,) if num_arrays(node) > 1 else ()
        started = node.opcode.endswith("-start") and node.opcode != "all-reduce-start"
        ends = self.graph.outputs((number, ((1,) if started else ()) + several))
        found = {self._parameter_of(self.arguments[n]) for n in ends if n in self.arguments}
        return [self.parameters[path] for path in sorted(found - {None})]

    def _parameter_of(self, argument: Argument) -> str | None:
        """The path of the parameter that this is, or keeps statistics of."""
        if argument.kind == "parameter":
            return argument.path
        if argument.kind != "optimizer":
            return None
        ends = [p for p in self.parameters if argument.path.endswith("." + _tail(p))]
        return max(ends, key=len, default=None)

    def _nearest(self, number: int, place: int = 0) -> tuple[str, str]:
        """(attributes, op_name) of a collective, or of what is nearest before or after it."""
        graph = self.graph
        node = graph.nodes[number]
        if node.instruction.op_name and not _is_argument(node.instruction.op_name):
            return node.instruction.attributes, node.instruction.op_name
        for step, start in (
            (graph.before, (node.operands[place], ())),
            (self._users, (number, ())),
        ):
            seen, left = {start}, collections.deque([start])
            while left and len(seen) < MOST_STEPS:
                value = left.popleft()
                one = graph.nodes[value[0]].instruction
                if one.op_name and not _is_argument(one.op_name):
                    return one.attributes, one.op_name
                new = [v for v in step(value) if v not in seen]
                seen.update(new)
                left.extend(new)
        return "", ""

    def _users(self, value: Value) -> list[Value]:
        users = [(user, ()) for user, _ in self.graph.users[value[0]]]
        return [*self.graph.after(*value), *users]


def _unchained(graph: Graph, numbers: Sequence[int]) -> list[int]:
    """The same without repetitions: a collective beside several fusions stands in each of them."""
    chains, kept = set(), []
    for number in numbers:
        found = re.search(r'chain_id="([^"]*)"', graph.nodes[number].instruction.attributes)
        if found is None or found[1] not in chains:
            kept.append(number)
        chains.add(found[1] if found else None)
    return kept


def _joined(served: Sequence[Served]) -> str:
    """Up to three names, the largest first; numbers count only where there is nothing else."""
    arrays = [one for one in served if one.role != "scalar"] or list(served)
    names = list(dict.fromkeys(one.name for one in sorted(arrays, key=lambda one: -one.bytes)))
    more = f" +{len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _module(op_name: str) -> str:
    """Module and einsum, "stack.layers.mlp btd,df->btf", or what the name says at its end."""
    module, last = module_of(op_name), op_name.split(";")[0].split("/")
    einsum = next((piece for piece in reversed(last) if "->" in piece), None)
    return " ".join(filter(None, (module, einsum or (last[-1] if not module else ""))))


def _is_argument(op_name: str) -> bool:
    """Whether this names an argument, "params['embed']", and not where in the program it is used."""
    return "['" in op_name.replace("\\", "")


def _sums_weights(op_name: str) -> bool:
    """Whether an einsum gives no activation, whose dimensions start with batch and length."""
    einsums = re.findall(r"->(\w+)", op_name)
    return not einsums or not {"b", "t"} & set(einsums[-1])


def _by_shape(parameters: Iterable[Argument]) -> Mapping[tuple[int, ...], Sequence[Argument]]:
    """Parameters by the dimensions of one layer, of all, or of a share."""
    found: dict[tuple[int, ...], dict[str, Argument]] = collections.defaultdict(dict)
    for one in parameters:
        for shape in (one.shape, one.shard_shape, one.shape[1:], one.shard_shape[1:]):
            if len(_dimensions(shape)) > 1:
                found[_dimensions(shape)][one.path] = one
    return {shape: tuple(x.values()) for shape, x in found.items()}


def _dimensions(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _tail(path: str) -> str:
    return path.partition(".")[2]
