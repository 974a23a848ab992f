"""HLO text to instructions: what `compiled.as_text()` of the TPU and the CPU compiler prints.

A line reads `%name = RESULT opcode(OPERANDS), ATTRIBUTES`. Results nest tuples and carry layouts with
brackets of their own (`{1,0:T(8,128)(2,1)S(1)}`), so lines are cut at balanced brackets.
"""

import dataclasses
import math
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. shapes: (dtype, dimensions) of every array of the result, in order.

    operands: names, or the literal of a constant. attributes: the text after the operands.
    """

    name: str
    opcode: str
    result: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: str
    attributes: str

    @property
    def bytes(self) -> int:
        return sum(array_bytes(dtype, shape) for dtype, shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *attributes: str) -> list[str]:
        """Computations named by these attributes, e.g. "calls"."""
        return [
            name
            for key in attributes
            for names in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            for name in re.findall(r"[\w.\-]+", names)
        ]


def array_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Of an array in HLO's dtype names; tokens and opaque values have none."""
    bits = 8 if dtype == "pred" else int((re.findall(r"^[a-z]+(\d+)", dtype) or [0])[0])
    return math.ceil(bits * math.prod(shape) / 8)


def parse_computations(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """Instructions of every computation by its name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None:
            instruction = parse_instruction(line)
            if instruction is not None:
                current.append(instruction)
    return computations, entry


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation's body, None where it is no instruction."""
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    start = head.end()
    end = _balanced(line, start, " ")
    opcode = re.match(r" ([a-z][\w\-]*)\(", line[end:])
    if not opcode:
        return None
    opened = end + opcode.end() - 1
    closed = _balanced(line, opened, ",")
    result = line[start:end]
    return Instruction(
        name=head[1],
        opcode=opcode[1],
        result=result,
        shapes=_shapes(result),
        operands=line[opened + 1 : closed - 1],
        attributes=line[closed:],
    )


def _balanced(line: str, start: int, stop: str) -> int:
    """The first place from `start` where `stop` stands outside all brackets, or the end."""
    depth = 0
    for match in re.compile(rf"[()\[\]{{}}{stop}]").finditer(line, start):
        character = match[0]
        if character == stop:
            if depth == 0:
                return match.start()
        else:
            depth += 1 if character in "([{" else -1
    return len(line)


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    return tuple(
        (dtype, tuple(int(size.strip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in found
    )
