"""Who feeds whom in a compiled program: arrays followed through loops, fusions and tuples.

A value is an instruction and the place in its result, which may be a tuple: `(node, (3,))`. It is followed
only where it stays itself: through moves (copies, casts, slices, collectives) and element by element.
Products, reductions and lookups make something new, there the way ends. So the origins of a gathered
weight are one argument of the step, and a gradient ends in one output.
"""

import collections
import dataclasses
import functools
import re

from llm_jax.planner.hlo_text import Instruction, parse_computations

Place = tuple[int, ...]
Value = tuple[int, Place]

COLLECTIVES = frozenset({
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
})  # fmt: skip

# Of these the first operand is the array, the others say where or fill up.
_OF_FIRST = frozenset({
    "bitcast", "bitcast-convert", "convert", "copy", "dynamic-slice", "pad", "reduce-precision",
    "reshape", "reverse", "slice", "transpose", "add-dependency",
})  # fmt: skip
_ELEMENTWISE = frozenset({
    "abs", "add", "and", "cbrt", "ceil", "clamp", "concatenate", "cosine", "divide", "erf",
    "exponential", "exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum",
    "minimum", "multiply", "negate", "not", "or", "power", "remainder", "round-nearest-afz",
    "round-nearest-even", "rsqrt", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sqrt", "subtract", "tan", "tanh", "xor",
})  # fmt: skip
_RUNS = frozenset({"fusion", "call", "async-start", "call-start", "conditional", "while"})
_CALLED = ("calls", "to_apply", "body", "true_computation", "false_computation",
           "branch_computations")  # fmt: skip
# Custom calls that start or end a collective inside fusions, or join the parts of a copy.
_MOVING_CALLS = frozenset({"AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
                           "ZeroCrop"})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Node:
    """An instruction in its place. operands: nodes of the same computation."""

    computation: str
    instruction: Instruction
    operands: tuple[int, ...]

    @property
    def opcode(self) -> str:
        return self.instruction.opcode


@dataclasses.dataclass(frozen=True)
class Origins:
    """What a value is made of. arguments: numbers of the entry's parameters; computed: and of more."""

    arguments: frozenset[int]
    computed: bool


class Graph:
    """All instructions of a module. nodes: by number; outputs: the entry's results by argument.

    aliased: which argument's memory an output takes over: {output: argument}.
    """

    def __init__(self, text: str):
        computations, self.entry = parse_computations(text)
        if self.entry is None:
            raise ValueError("this text is no HLO module: it has no line that starts with ENTRY")
        self.nodes: list[Node] = []
        self.by_name: dict[str, int] = {}
        self.users: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        self.roots: dict[str, int] = {}
        self.parameters: dict[str, dict[int, int]] = collections.defaultdict(dict)
        self.callers: dict[str, list[int]] = collections.defaultdict(list)
        self.called: dict[int, list[str]] = {}
        # Collectives between slices: what the host sends and what it gives back, by their common name.
        self._transfers: dict[str, dict[str, int]] = collections.defaultdict(dict)
        self.aliased = _aliases(text)
        roots = set(re.findall(r"^\s+ROOT %?([\w.\-]+) = ", text, re.MULTILINE))
        for name, instructions in computations.items():
            self._add(name, instructions, roots)
        pairs = [ends for ends in self._transfers.values() if {"send", "recv"} <= set(ends)]
        self._received = {ends["send"]: ends["recv"] for ends in pairs}
        self._sent = {ends["recv"]: ends["send"] for ends in pairs}

    def _add(self, computation: str, instructions: list[Instruction], roots: set[str]) -> None:
        first = len(self.nodes)
        local = {one.name: first + place for place, one in enumerate(instructions)}
        self.by_name |= local
        for number, one in enumerate(instructions, first):
            names = one.operand_names
            node = Node(computation, one, tuple(local[name] for name in names if name in local))
            self.nodes.append(node)
            for place, operand in enumerate(node.operands):
                self.users[operand].append((number, place))
            if one.opcode == "parameter":
                self.parameters[computation][int(one.operands)] = number
            elif one.opcode in _RUNS:
                self.called[number] = one.called(*_CALLED)
                for name in self.called[number]:
                    self.callers[name].append(number)
            elif transfer := re.search(r'_host_transfer_rendezvous="([^"]*)"', one.attributes):
                self._transfers[transfer[1]][one.opcode] = number
            if one.name in roots or computation not in self.roots:
                self.roots[computation] = number

    def argument_names(self) -> dict[int, str]:
        """The entry's parameters as the traced function calls them: "state.params['embed']"."""
        return {
            number: self.nodes[node].instruction.op_name.replace("\\", "")
            for number, node in self.parameters[self.entry].items()
        }

    def collectives_of(self, name: str) -> list[int]:
        """The nodes of the collectives that an instruction is, starts, ends or holds."""
        if name not in self.by_name:
            return []
        node = self.nodes[self.by_name[name]]
        if kind_of(node) is not None:
            return [self.by_name[name]]
        if node.opcode.endswith("-done") and node.operands:
            return self.collectives_of(self.nodes[node.operands[0]].instruction.name)
        return [
            number
            for called in self.called.get(self.by_name[name], ())
            for number, inner in enumerate(self.nodes)
            if inner.computation == called and kind_of(inner) is not None
        ]

    def origins(self, value: Value) -> Origins:
        """Where a value comes from; constants and indices count for nothing."""
        arguments, computed, seen, left = set(), False, {value}, [value]
        while left:
            number, path = left.pop()
            node = self.nodes[number]
            if node.opcode == "parameter" and node.computation == self.entry:
                arguments.add(int(node.instruction.operands))
                continue
            before = self._before(number, path)
            if before is None:
                computed = True
                continue
            for one in before:
                if one not in seen:
                    seen.add(one)
                    left.append(one)
        return Origins(frozenset(arguments), computed)

    def before(self, value: Value) -> list[Value]:
        """What a value is moved or made from, one step back."""
        node = self.nodes[value[0]]
        if node.opcode == "parameter" and node.computation == self.entry:
            return []
        moved = self._before(*value)
        return [(operand, ()) for operand in node.operands] if moved is None else moved

    def outputs(self, value: Value) -> frozenset[int]:
        """The entry's results that a value ends in, by the argument whose memory they take over."""
        found, seen, left = set(), {value}, [value]
        while left:
            number, path = left.pop()
            if number == self.roots[self.entry] and path:
                found.add(self.aliased.get(path[0], -1))
                continue
            for one in self.after(number, path):
                if one not in seen:
                    seen.add(one)
                    left.append(one)
        return frozenset(found - {-1})

    def _before(self, number: int, path: Place) -> list[Value] | None:
        """What a value is moved or computed from; None where something new is made."""
        node = self.nodes[number]
        opcode, operands = node.opcode, node.operands
        if opcode == "parameter":
            return self._into(number, path)
        if opcode in ("constant", "iota", "partition-id", "replica-id", "compare", "rng"):
            return []
        if opcode == "recv":
            return (
                [(self.nodes[self._sent[number]].operands[0], ())] if number in self._sent else []
            )
        if opcode == "tuple":
            return [(operands[path[0]], path[1:])] if path else [(o, ()) for o in operands]
        if opcode == "get-tuple-element":
            return [(operands[0], (_index(node), *path))]
        if opcode == "while":
            return [(operands[0], path), *self._root(number, path)]
        if opcode in ("fusion", "call", "conditional"):
            return self._root(number, path)
        if opcode in ("async-start", "call-start"):
            if path[:1] == (0,):
                return [(operands[path[1]], path[2:])] if path[1:] else []
            return self._root(number, path[1:])
        if opcode.endswith("-done") or opcode == "async-update":
            return [(operands[0], _started(self.nodes[operands[0]], path))]
        return self._before_array(node, path)

    def _before_array(self, node: Node, path: Place) -> list[Value] | None:
        opcode, operands = node.opcode, node.operands
        if opcode == "opt-barrier" or opcode == "copy-start":
            return _barred(node, path)
        if kind_of(node) is not None:
            place = path[1:] if _starts(opcode) else path
            return [(operands[place[0]], ())] if place and place[0] < len(operands) else [
                (o, ()) for o in operands
            ]  # fmt: skip
        if opcode.removesuffix("-start") in _OF_FIRST or opcode in ("broadcast", "reduce"):
            return [(operands[0], ())]
        if opcode == "dynamic-update-slice":
            return [(o, ()) for o in operands[:2]]
        if opcode == "select":
            return [(o, ()) for o in operands[1:]]
        if opcode in _ELEMENTWISE or (opcode == "custom-call" and self._moves(node)):
            return [(o, ()) for o in operands]
        return [] if opcode == "custom-call" and not operands else None

    def _into(self, number: int, path: Place) -> list[Value]:
        """What the callers give to a computation's parameter."""
        node, values = self.nodes[number], []
        place = int(node.instruction.operands)
        for caller in self.callers[node.computation]:
            one = self.nodes[caller]
            if one.opcode == "conditional":
                place = 1 + self.called[caller].index(node.computation)
            if place < len(one.operands):
                values.append((one.operands[place], path))
            if one.opcode == "while":
                values += self._root(caller, path)
        return values

    def _root(self, caller: int, path: Place) -> list[Value]:
        return [(self.roots[c], path) for c in self.called[caller] if c in self.roots]

    def _moves(self, node: Node) -> bool:
        """Whether a custom call only lays out anew, or is a part of something asynchronous."""
        if node.instruction.target in _MOVING_CALLS:
            return True
        if node.instruction.target == "tpu_custom_call" or len(node.operands) != 1:
            return False
        sizes = [_elements(x) for x in (node, self.nodes[node.operands[0]])]
        return sizes[0] == sizes[1] > 0

    def after(self, number: int, path: Place) -> list[Value]:
        """The values that a value becomes, in its users and in the callers of its computation."""
        values = self._returned(number, path)
        if number in self._received:
            values.append((self._received[number], (0,)))
        for user, place in self.users[number]:
            node = self.nodes[user]
            if node.opcode in _RUNS:
                values += self._entered(user, place, path)
            elif node.opcode == "get-tuple-element":
                if not path or path[0] == _index(node):
                    values.append((user, path[1:]))
            elif node.opcode == "tuple":
                values.append((user, (place, *path)))
            else:
                values += self._after_array(user, place, path)
        return values

    def _after_array(self, user: int, place: int, path: Place) -> list[Value]:
        node = self.nodes[user]
        opcode = node.opcode
        if opcode.endswith("-done") or opcode == "async-update":
            started = self.nodes[node.operands[0]].opcode
            return [(user, path[1:] if _starts(started) or started == "copy-start" else path)]
        if opcode == "send":
            return [(user, ())] if place == 0 else []
        if opcode == "opt-barrier":
            return [(user, path if len(node.operands) == 1 else (place, *path))]
        if opcode == "copy-start":
            return [(user, (0,))]
        if kind_of(node) is not None:
            several = (place,) if len(node.operands) > 1 else ()
            return [(user, ((1,) if _starts(opcode) else ()) + several)]
        if opcode.removesuffix("-start") in _OF_FIRST and place == 0:
            return [(user, (1,) if _starts(opcode) else ())]
        moved = (
            opcode in _ELEMENTWISE
            or (opcode == "dynamic-update-slice" and place < 2)
            or (opcode == "select" and place > 0)
            or (opcode == "custom-call" and self._moves(node))
        )
        return [(user, ())] if moved else []

    def _entered(self, user: int, place: int, path: Place) -> list[Value]:
        """The parameters that a value becomes in what an instruction runs."""
        names = self.called[user]
        if self.nodes[user].opcode == "conditional":
            names, place = names[place - 1 : place], 0
        return [
            (self.parameters[name][place], path)
            for name in names
            if place in self.parameters.get(name, ())
        ]

    def _returned(self, number: int, path: Place) -> list[Value]:
        computation = self.nodes[number].computation
        if self.roots.get(computation) != number:
            return []
        values = []
        for caller in self.callers[computation]:
            opcode = self.nodes[caller].opcode
            values.append((caller, (1, *path) if _starts(opcode) else path))
            if opcode == "while" and 0 in self.parameters[computation]:
                values.append((self.parameters[computation][0], path))
        return values


@functools.lru_cache(maxsize=2)
def graph_of(text: str) -> Graph:
    """The graph of a module's text; the last ones are kept, for those who read the same step."""
    return Graph(text)


def kind_of(node: Node) -> str | None:
    """Which collective an instruction is or starts, None if none. Between slices it starts as a send."""
    between = re.search(r'_megascale_transfer_type="(\w+)"', node.instruction.attributes)
    if between and node.opcode == "send":
        return between[1].lower().replace("_", "-")
    kind = node.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def num_arrays(node: Node) -> int:
    """That a collective is about; a send has a token beside its one."""
    return 1 if node.opcode == "send" else max(1, len(node.operands))


def result_shapes(node: Node) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(dtype, dimensions) of what a collective gives, one for each operand.

    The result of a start holds the operands before the results.
    """
    shapes, count = node.instruction.shapes, num_arrays(node)
    return shapes[count : 2 * count] if _starts(node.opcode) else shapes[:count]


def _starts(opcode: str) -> bool:
    """Whether the result holds the operands and, at place 1, what comes out."""
    return opcode.endswith("-start") and opcode not in ("all-reduce-start", "copy-start")


def _barred(node: Node, path: Place) -> list[Value]:
    if node.opcode == "copy-start" or len(node.operands) == 1:
        return [(node.operands[0], path if node.opcode == "opt-barrier" else ())]
    return [(node.operands[path[0]], path[1:])] if path else [(o, ()) for o in node.operands]


def _started(start: Node, path: Place) -> Place:
    """Where the result of a "-done" stands in the result of its start."""
    if start.opcode == "copy-start":
        return (0, *path)
    return (1, *path) if _starts(start.opcode) else path


def _index(node: Node) -> int:
    return int(re.search(r"\bindex=(\d+)", node.instruction.attributes)[1])


def _elements(node: Node) -> int:
    total = 0
    for _, shape in node.instruction.shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def _aliases(text: str) -> dict[int, int]:
    head = re.search(r"input_output_alias=\{(.*?)\}(?:, \w+=|\n)", text[: text.find("\n") + 1])
    pairs = re.findall(r"\{(\d+)\}: \((\d+),", head[1] if head else "")
    return {int(output): int(argument) for output, argument in pairs}
