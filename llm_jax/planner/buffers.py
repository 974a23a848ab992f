"""What lies where in memory and when: the compiler's buffer assignment and live ranges, parsed.

An allocation is one piece of memory; the arrays of a program ("values") have places in it. Arguments,
constants and results have allocations of their own and are there all the time. All else lies in one
heap, where arrays whose lives do not overlap share addresses. Times are places in the schedule, in
which the body of a loop stands, once, before its loop.
"""

import bisect
import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

AllocationKind = Literal["argument", "result", "constant", "heap", "call"]

# Places among an allocation's "colors": the device's main memory, the host's; the others are on the chip.
_MAIN_MEMORY, _HOST_MEMORY = 0, 5


@dataclasses.dataclass(frozen=True)
class Value:
    """name: of the instruction; index: of the part of its result, "1,0", "" for the whole.

    offset, size: bytes in the allocation; start, end: first and last time it is needed, or None.
    """

    name: str
    index: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    start: int | None
    end: int | None


@dataclasses.dataclass(frozen=True)
class Allocation:
    """parameter: the number of the entry's parameter that lies here, or None.

    "call" is what a called computation sees as its own arguments or works on: it lies in others.
    """

    size: int
    kind: AllocationKind
    parameter: int | None
    values: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Main memory of one device. host: bytes besides, in the memory of its host."""

    allocations: tuple[Allocation, ...]
    schedule: tuple[str, ...]
    host: int = 0

    @property
    def fixed(self) -> tuple[Allocation, ...]:
        """Arguments, results that are in none of them, and constants."""
        return tuple(a for a in self.allocations if a.kind not in ("heap", "call"))

    @property
    def heaps(self) -> tuple[Allocation, ...]:
        return tuple(a for a in self.allocations if a.kind == "heap")

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(a.size for a in (*self.fixed, *self.heaps))

    def used(self) -> list[tuple[int, int]]:
        """(time, bytes of the heaps in use from then on), where it changes, in order of time."""
        changes: dict[int, int] = collections.defaultdict(int)
        for heap in self.heaps:
            before = 0
            for time, now in _used(heap.values):
                changes[time] += now - before
                before = now
        total, steps = 0, []
        for time in sorted(changes):
            total += changes[time]
            if not steps or steps[-1][1] != total:
                steps.append((time, total))
        return steps

    def alive(self, time: int) -> list[Value]:
        """Values of the heaps, those of later heaps after those of earlier ones."""
        return [
            value
            for heap in self.heaps
            for value in heap.values
            if value.start is not None and value.start <= time <= value.end
        ]


def parse_layout(buffer_assignment: str, live_ranges: str) -> Layout:
    """Reads the two dumps of one module, `*-buffer-assignment.txt` and `*-live-range.txt`.

    Raises:
      ValueError: the text is no buffer assignment.
    """
    if not buffer_assignment.startswith("BufferAssignment:"):
        raise ValueError("this text is no buffer assignment: it does not start with that word")
    ranges, schedule = _parse_ranges(live_ranges)
    found: list[tuple[str, list[Value]]] = []
    for line in buffer_assignment.splitlines():
        if line.startswith("allocation "):
            found.append((line, []))
        elif found and line.startswith(" value: "):
            value = _parse_value(line, ranges)
            if value is not None:
                found[-1][1].append(value)
    placed = [(_color(line), _parse_allocation(line, values)) for line, values in found]
    of = lambda place: tuple(a for color, a in placed if color == place)  # noqa: E731
    host = sum(a.size for a in of(_HOST_MEMORY) if a.kind != "call")
    return Layout(of(_MAIN_MEMORY), schedule, host)


def _color(line: str) -> int:
    found = re.search(r", color (\d+)", line)
    return int(found[1]) if found else _MAIN_MEMORY


def _parse_allocation(line: str, values: list[Value]) -> Allocation:
    parameter = re.search(r", parameter (\d+)", line)
    kind: AllocationKind = "result"
    if ", thread-local" in line:
        kind = "call"
    elif parameter:
        kind = "argument"
    elif ", preallocated-temp" in line:
        kind = "heap"
    elif ", constant" in line:
        kind = "constant"
    size = int(re.search(r": size (\d+)", line)[1])
    return Allocation(size, kind, int(parameter[1]) if parameter else None, tuple(values))


_VALUE = re.compile(
    r" value: <\d+ ([^\s{]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)"
)


def _parse_value(line: str, ranges: Mapping[str, tuple[int, int]]) -> Value | None:
    found = _VALUE.match(line)
    if not found:
        return None
    name, index, size, offset, result = found.groups()
    index = index or ""
    array = re.match(r"([a-z]\w*)\[([\d,<=]*)\]", result)
    dtype = array[1] if array else "tuple"
    shape = tuple(int(n.strip("<=")) for n in array[2].split(",") if n) if array else ()
    start, end = ranges.get(f"{name}{{{index}}}", (None, None))
    return Value(name, index, int(offset), int(size), dtype, shape, start, end)


def _parse_ranges(text: str) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Live ranges by "name{index}" and the instructions in order."""
    schedule = re.findall(r"^    \d+:(\S+)$", text, re.M)
    ranges = {
        key: (int(start), int(end))
        for key, start, end in re.findall(r"^    (\S+\{[\d,]*\}):(\d+)-(\d+)$", text, re.M)
    }
    return ranges, tuple(schedule)


def _used(values: Iterable[Value]) -> list[tuple[int, int]]:
    """(time, bytes that the values alive cover together) at each start and after each end."""
    starts, ends = collections.defaultdict(list), collections.defaultdict(list)
    for value in values:
        if value.start is not None:
            place = (value.offset, value.offset + value.size)
            starts[value.start].append(place)
            ends[value.end + 1].append(place)
    alive: list[tuple[int, int]] = []
    steps = []
    for time in sorted(starts.keys() | ends.keys()):
        for place in ends[time]:
            del alive[bisect.bisect_left(alive, place)]
        for place in starts[time]:
            bisect.insort(alive, place)
        steps.append((time, _covered(alive)))
    return steps


def _covered(places: Sequence[tuple[int, int]]) -> int:
    """Bytes in the union of [begin, end) pairs that are sorted."""
    total = reached = 0
    for begin, end in places:
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total
