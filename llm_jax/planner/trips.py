"""How often a loop of an HLO module runs, from its condition, its first value and its step.

XLA notes `known_trip_count` on CPU and GPU. On TPU it is read here: the condition compares an
element of the loop's tuple, which the body moves by a constant, with a bound, a constant of the
condition or an element that the body passes on. Of any other form nothing is known; nothing is guessed
from constants that merely stand there.

One loop is known by its name: the rounds that experts add for choices beyond their buffers
(nn/experts.py). How many, only the router knows; they count as none, as they are with an even one.
"""

import dataclasses
import re
from collections.abc import Sequence

from llm_jax.nn.experts import OVERFLOW_ROUNDS
from llm_jax.planner.hlo_text import Computations, Instruction, root

# Instructions that hand on the value of their only operand.
_SAME = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier"}


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of the tuple that a loop carries."""

    index: int


@dataclasses.dataclass(frozen=True)
class _Moved:
    """An element plus a constant."""

    index: int
    step: int


_Value = int | _Element | _Moved | None


def trip_count(computations: Computations, loops: Sequence[tuple[str, Instruction]]) -> int | None:
    """Runs of the body of the innermost loop each time it runs; None where the text does not say.

    loops: each with the computation that holds it, the outermost first.
    """
    loop = loops[-1][1]
    if OVERFLOW_ROUNDS in loop.op_name.split("/"):
        return 0
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    compared = _compared(_Values(computations, condition), root(computations[condition]))
    if compared is None:
        return None
    counter, bound, direction = compared
    step = _Values(computations, body).element(root(computations[body]).name, counter.index)
    if isinstance(bound, _Element):
        bound = _carried(computations, loops, bound.index)
    if not isinstance(bound, int) or not isinstance(step, _Moved) or step.index != counter.index:
        return None
    first = _given(computations, loops, counter.index)
    return None if first is None else _runs(first, bound, step.step, direction)


def _carried(
    computations: Computations, loops: Sequence[tuple[str, Instruction]], index: int
) -> int | None:
    """The constant in an element that the innermost loop does not change."""
    (body,) = loops[-1][1].called("body")
    after = _Values(computations, body).element(root(computations[body]).name, index)
    return _given(computations, loops, index) if after == _Element(index) else None


def _given(
    computations: Computations, loops: Sequence[tuple[str, Instruction]], index: int
) -> int | None:
    """The constant with which an element enters the innermost loop."""
    where, loop = loops[-1]
    value = _Values(computations, where).element(loop.operand_names[0], index)
    if isinstance(value, _Element) and len(loops) > 1:
        return _carried(computations, loops[:-1], value.index)
    return value if isinstance(value, int) else None


def _runs(first: int, bound: int, step: int, direction: str) -> int | None:
    """Of a counter that goes on while it compares so with the bound."""
    if step == 0:
        return None
    distance = bound - first
    if direction in ("LE", "GE"):
        distance += 1 if direction == "LE" else -1
    return max(-(-distance // step), 0) if distance * step > 0 else 0


def _compared(values: "_Values", last: Instruction) -> tuple[_Element, _Value, str] | None:
    """The counter, what it is compared with, and how, the counter to the left."""
    if last.opcode in _SAME:
        return _compared(values, values.by_name[last.operand_names[0]])
    if last.opcode == "fusion":
        (target,) = last.called("calls")
        inner = values.inside(target, last)
        return _compared(inner, root(values.computations[target]))
    if last.opcode != "compare":
        return None
    direction = re.search(r"direction=([A-Z]+)", last.attributes)[1]
    left, right = (values.of(name) for name in last.operand_names)
    if isinstance(right, _Element) and not isinstance(left, _Element):
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    return (left, right, direction) if isinstance(left, _Element) else None


class _Values:
    """Integers of one computation, as far as they follow from constants and the loop's tuple."""

    def __init__(
        self, computations: Computations, name: str, arguments: tuple[_Value, ...] | None = None
    ):
        self.computations = computations
        self.by_name = {one.name: one for one in computations[name]}
        self._arguments = arguments

    def inside(self, target: str, caller: Instruction) -> "_Values":
        """The values in a computation that `caller` fuses."""
        arguments = tuple(self.of(name) for name in caller.operand_names)
        return _Values(self.computations, target, arguments)

    def of(self, name: str) -> _Value:
        one = self.by_name.get(name)
        if one is None:
            return None
        if one.opcode == "constant":
            return int(one.operands) if re.fullmatch(r"-?\d+", one.operands) else None
        if one.opcode == "parameter" and self._arguments is not None:
            return self._arguments[int(one.operands)]
        if one.opcode == "get-tuple-element":
            return self.element(one.operand_names[0], int(_index(one)))
        if one.opcode in _SAME:
            return self.of(one.operand_names[0])
        if one.opcode in ("add", "subtract"):
            return self._sum(one)
        if one.opcode == "fusion":
            (target,) = one.called("calls")
            return self.inside(target, one).of(root(self.computations[target]).name)
        return None

    def element(self, name: str, index: int) -> _Value:
        """Of a tuple."""
        one = self.by_name.get(name)
        if one is None:
            return None
        if one.opcode == "parameter" and self._arguments is None:
            return _Element(index)
        if one.opcode in ("copy", "opt-barrier"):
            return self.element(one.operand_names[0], index)
        if one.opcode == "fusion":
            (target,) = one.called("calls")
            given = root(self.computations[target]).name
            return self.inside(target, one).element(given, index)
        return self.of(one.operand_names[index]) if one.opcode == "tuple" else None

    def _sum(self, one: Instruction) -> _Value:
        left, right = (self.of(name) for name in one.operand_names)
        sign = 1 if one.opcode == "add" else -1
        if isinstance(left, int) and isinstance(right, _Element) and sign == 1:
            left, right = right, left
        if isinstance(left, int) and isinstance(right, int):
            return left + sign * right
        if isinstance(left, _Element) and isinstance(right, int):
            return _Moved(left.index, sign * right)
        return None


def _index(one: Instruction) -> str:
    return re.search(r"index=(\d+)", one.attributes)[1]
