"""HLO text to instructions: what `compiled.as_text()` of the TPU and the CPU compiler prints.

A line reads `%name = RESULT opcode(OPERANDS), ATTRIBUTES`. Results nest tuples and carry layouts
with brackets of their own (`{1,0:T(8,128)(2,1)S(1)}`), so lines are cut at balanced brackets. The
attributes of a kernel run over several lines. The computations of a scheduled module list their
instructions in the order in which they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

Computations = dict[str, list["Instruction"]]


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result. space: of memory; 0 is HBM, 1 VMEM, 5 the host's."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        return array_bytes(self.dtype, self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. shapes: (dtype, dimensions) of every array of the result, in order.

    operands: names, or the literal of a constant. attributes: the text after the operands.
    is_root: its result is that of the computation.
    """

    name: str
    opcode: str
    result: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: str
    attributes: str
    is_root: bool = False

    @property
    def bytes(self) -> int:
        return sum(array_bytes(dtype, shape) for dtype, shape in self.shapes)

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def operand_names(self) -> tuple[str, ...]:
        """Of the instructions whose results it takes; a text may print types before the names."""
        if "%" in self.operands:
            return tuple(re.findall(r"%([\w.\-]+)", self.operands))
        if self.opcode in ("constant", "parameter", "iota"):
            return ()
        return tuple(piece.strip() for piece in self.operands.split(",") if piece.strip())

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result and the memory they lie in."""
        return tuple(
            Array(dtype, _sizes(sizes), int(space or 0))
            for dtype, sizes, space in _PLACED.findall(self.result)
        )

    @property
    def target(self) -> str:
        """Of a custom call, else ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *attributes: str) -> list[str]:
        """Computations named by these attributes, e.g. "calls"."""
        return [
            name
            for key in attributes
            for names in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            for name in re.findall(r"[\w.\-]+", names)
        ]


def root(instructions: Sequence[Instruction]) -> Instruction:
    """The one whose result a computation gives."""
    return next((one for one in reversed(instructions) if one.is_root), instructions[-1])


def array_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Of an array in HLO's dtype names; tokens and opaque values have none."""
    return math.ceil(_bits(dtype) * math.prod(shape) / 8)


@functools.lru_cache(maxsize=4)
def parse_computations(text: str) -> tuple[Computations, str | None]:
    """Instructions of every computation by its name, and the name of the entry.

    Several analyses read the same text, so the result is kept: it must not be changed.
    """
    computations: Computations = {}
    entry = None
    for head, lines in _blocks(re.sub(r"/\*.*?\*/", "", text)):
        instructions = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
        parsed = (parse_instruction(line) for line in lines)
        instructions.extend(one for one in parsed if one is not None)
    return computations, entry


def _blocks(text: str) -> Iterator[tuple[re.Match, list[str]]]:
    """The head of each computation and its instructions, one string each however many lines."""
    head, lines = None, []
    for line in text.splitlines():
        if head is None:
            head = _HEAD.match(line)
        elif line.startswith("}") and not line.startswith("}}"):
            yield head, lines
            head, lines = None, []
        elif _START.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation's body, None where it is no instruction."""
    head = _START.match(line)
    if not head:
        return None
    start = head.end()
    end = _balanced(line, start, _AT_SPACE)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    opened = opcode.end() - 1
    closed = _balanced(line, opened, _AT_COMMA)
    result = line[start:end]
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        result=result,
        shapes=_shapes(result),
        operands=line[opened + 1 : closed - 1],
        attributes=line[closed:],
        is_root=head[1] is not None,
    )


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_AT_SPACE, _AT_COMMA = re.compile(r"[()\[\]{} ]"), re.compile(r"[()\[\]{},]")
_PLACED = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[^{}]*?(?:S\((\d+)\)[^{}]*)?\})?")


def _balanced(line: str, start: int, stop: re.Pattern) -> int:
    """The first place from `start` where `stop` finds what is no bracket outside all, or the end."""
    depth = 0
    for match in stop.finditer(line, start):
        character = match[0]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0:
            return match.start()
    return len(line)


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    return tuple((dtype, _sizes(sizes)) for dtype, sizes in found)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size.strip("<=")) for size in text.split(",") if size)


@functools.cache
def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int((re.findall(r"^[a-z]+(\d+)", dtype) or [0])[0])
