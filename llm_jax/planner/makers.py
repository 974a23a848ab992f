"""What made an array: from a name in a compiled program back through views, loops and copies.

What a loop carries, a tuple holds or a copy moves has no story of its own. Its maker is the instruction
that computed it; for an array that a loop fills a slice at a time, what computed the slices.
"""

import collections
import dataclasses
import re

from llm_jax.planner.hlo_collectives import collectives_in
from llm_jax.planner.hlo_text import Instruction, parse_computations, root
from llm_jax.planner.plan import Direction
from llm_jax.planner.source import Sources, direction_of, module_of

_MOVES = {
    "bitcast", "convert", "copy", "copy-start", "copy-done", "reduce-precision", "reshape", "transpose",
}  # fmt: skip
# How many instructions to look back through for one whose name tells the module.
_LOOK_BACK = 16


@dataclasses.dataclass(frozen=True)
class Maker:
    """instruction: None where the text does not hold it. source: its line, "" if unknown.

    stacked: a loop writes the array slice by slice. collective: the kind in it, else None; multiplies:
    a matrix product is in it. parameter: its number, where the array is an argument of the program or a
    copy of one.
    """

    instruction: Instruction | None
    op_name: str
    source: str
    stacked: bool
    collective: str | None
    multiplies: bool
    parameter: int | None

    @property
    def module(self) -> str:
        return module_of(self.op_name)

    @property
    def direction(self) -> Direction:
        return direction_of(self.op_name)


class Makers:
    """The makers of a program's arrays."""

    def __init__(self, hlo: str):
        self._computations, self._entry = parse_computations(hlo)
        self._sources = Sources(hlo)
        self._of: dict[str, tuple[Instruction, str]] = {}
        self._loops: dict[str, Instruction] = {}
        self._callers: dict[str, Instruction] = {}
        for name, body in self._computations.items():
            for one in body:
                self._of[one.name] = one, name
                if one.opcode == "while":
                    self._loops[one.called("body")[0]] = one
                for called in one.called("calls", "to_apply"):
                    self._callers[called] = one

    def instruction(self, name: str) -> Instruction | None:
        return self._of[name][0] if name in self._of else None

    def parameters(self) -> dict[int, Instruction]:
        """The entry's, by number."""
        entry = self._computations.get(self._entry, [])
        return {int(one.operands): one for one in entry if one.opcode == "parameter"}

    def source(self, name: str) -> str:
        """The source line of an instruction, "" if unknown."""
        one = self.instruction(name)
        return "" if one is None else self._sources.of_attributes(self._teller(one).attributes)

    def of(self, name: str, index: str = "") -> Maker:
        """The maker of the part `index`, e.g. "2", of what instruction `name` gives."""
        place = name, tuple(int(i) for i in index.split(",") if i)
        stacked, seen = False, set()
        while place is not None and place not in seen and place[0] in self._of:
            seen.add(place)
            name, parts = place
            one, computation = self._of[name]
            place = self._behind(one, computation, parts)
            if place is None and (update := self._update(one)):
                stacked, place = True, (update, ())
        return self._maker(name, stacked)

    def _maker(self, name: str, stacked: bool) -> Maker:
        if name not in self._of:
            return Maker(None, "", "", stacked, None, False, None)
        one, computation = self._of[name]
        is_argument = one.opcode == "parameter" and computation == self._entry
        teller = self._teller(one)
        collective = next(collectives_in(self._computations, one, set()), None)
        return Maker(
            instruction=one,
            op_name=teller.op_name.replace("\\", ""),
            source=self._sources.of_attributes(teller.attributes),
            stacked=stacked,
            collective=None if collective is None else collective[1],
            multiplies=self._multiplies(one),
            parameter=int(one.operands) if is_argument else None,
        )

    def _behind(
        self, one: Instruction, computation: str, index: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        """Where the same array was before, or None where it was made."""
        operands = one.operand_names
        if one.opcode == "get-tuple-element":
            return operands[0], (_index(one), *index)
        if one.opcode == "tuple" and index:
            return operands[index[0]], index[1:]
        if one.opcode == "while" and index:
            return self._carried(one, index)
        if one.opcode == "call":
            return self._root(one.called("to_apply")[0]).name, index
        if one.opcode == "parameter" and computation in self._loops:
            return self._loops[computation].name, index
        if one.opcode == "parameter" and computation in self._callers:
            return self._given(computation, one, index)
        if one.opcode == "fusion":
            inner = self._skip_moves(self._root(one.called("calls")[0]).name)
            return (operands[int(inner.operands)], ()) if inner.opcode == "parameter" else None
        if one.opcode == "opt-barrier":
            return operands[0], index
        if one.opcode in _MOVES or one.opcode.endswith("-done"):
            return operands[0], ()
        return None

    def _given(
        self, computation: str, parameter: Instruction, index: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        """What the caller of a computation gives for a parameter."""
        operands = self._callers[computation].operand_names
        number = int(parameter.operands)
        return (operands[number], index) if number < len(operands) else None

    def _carried(self, loop: Instruction, index: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """What the body of a loop hands on; what came before the loop, if that is what it was given."""
        result = self._root(loop.called("body")[0])
        if result.opcode != "tuple":
            return result.name, index
        given = result.operand_names[index[0]]
        inner = self._skip_moves(given)
        unchanged = inner.opcode == "get-tuple-element" and _index(inner) == index[0]
        if unchanged and self._of[inner.operand_names[0]][0].opcode == "parameter":
            return loop.operand_names[0], index
        return given, index[1:]

    def _update(self, one: Instruction) -> str | None:
        """What a dynamic-update-slice, or the fusion of one, writes into the larger array."""
        if one.opcode == "dynamic-update-slice":
            return one.operand_names[1]
        if one.opcode != "fusion":
            return None
        inner = self._skip_moves(self._root(one.called("calls")[0]).name)
        if inner.opcode != "dynamic-update-slice":
            return None
        update = self._skip_moves(inner.operand_names[1])
        if update.opcode != "parameter":
            return update.name
        return one.operand_names[int(update.operands)]

    def _skip_moves(self, name: str) -> Instruction:
        one = self._of[name][0]
        while one.opcode in _MOVES:
            one = self._of[one.operand_names[0]][0]
        return one

    def _multiplies(self, one: Instruction) -> bool:
        if one.opcode in ("dot", "convolution"):
            return True
        inside = one.called("calls") if one.opcode == "fusion" else ()
        return any(self._multiplies(i) for name in inside for i in self._computations.get(name, ()))

    def _teller(self, one: Instruction) -> Instruction:
        """`one`, or where its metadata names no module, what in its fusion or before it does."""
        queue, seen = collections.deque([one.name]), set()
        while queue and len(seen) < _LOOK_BACK:
            name = queue.popleft()
            if name in seen or name not in self._of:
                continue
            seen.add(name)
            before, computation = self._of[name]
            inside = self._computations.get(next(iter(before.called("calls")), ""), ())
            for candidate in (before, *reversed(inside)):
                if module_of(candidate.op_name):
                    return candidate
            place = self._behind(before, computation, ())
            queue.extend((place[0],) if place else before.operand_names)
        return one

    def _root(self, computation: str) -> Instruction:
        return root(self._computations[computation])


def _index(one: Instruction) -> int:
    return int(re.search(r"\bindex=(\d+)", one.attributes)[1])
