"""Rows of tokens as a tree of the beginnings that they share, so that each is computed once.

The choices of a question share the question, and the questions of a task their examples. A node holds a
run of tokens; what follows it in different rows are its children. A beginning that is shared by less than
`min_shared` tokens stands in each of the rows: a run of its own would cost more than it saves.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Queries:
    """Tokens whose probability is asked; all [Q] int64.

    positions: of the token before, in its row. targets: the ids asked for. slots: where the answer goes.
    """

    positions: np.ndarray
    targets: np.ndarray
    slots: np.ndarray

    def within(self, start: int, end: int) -> "Queries":
        inside = (self.positions >= start) & (self.positions < end)
        return Queries(self.positions[inside], self.targets[inside], self.slots[inside])

    @classmethod
    def joined(cls, parts: Sequence["Queries"]) -> "Queries":
        fields = ("positions", "targets", "slots")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


@dataclasses.dataclass(eq=False)
class Node:
    """tokens [n] int32 stand from position `start` on; `queries` ask behind them, `children` follow.

    size: tokens of the whole branch, those of this node and of all below it.
    """

    start: int
    tokens: np.ndarray
    queries: Queries
    children: list["Node"]
    size: int = 0


def prefix_tree(
    rows: Sequence[np.ndarray], queries: Sequence[Queries], min_shared: int = 16
) -> list[Node]:
    """The roots of the tree of all rows [n] int32, which share no more than `min_shared` - 1 tokens."""
    rows, queries = _without_beginnings(rows, queries)
    shared = [_shared_length(a, b) for a, b in itertools.pairwise(rows)]
    shared = np.array(shared, np.int64)
    roots: list[Node] = []
    # Rows first .. last - 1 share their tokens up to `start`, which stand above `siblings`.
    todo = [(0, len(rows), 0, roots)] if rows else []
    found: list[Node] = []  # parents before children
    while todo:
        first, last, start, siblings = todo.pop()
        end = len(rows[first]) if last == first + 1 else int(shared[first : last - 1].min())
        below, begin = siblings, start
        if last == first + 1 or end - start >= min_shared:
            asked = Queries.joined([q.within(start, end) for q in queries[first:last]])
            node = Node(start, rows[first][start:end], asked, [])
            siblings.append(node)
            found.append(node)
            below, begin = node.children, end
        if last > first + 1:
            cuts = first + 1 + np.flatnonzero(shared[first : last - 1] == end)
            borders = [first, *cuts.tolist(), last]
            parts = itertools.pairwise(borders)
            # The last in is the next out: so children stand in the order of their rows.
            todo.extend((a, b, begin, below) for a, b in reversed(list(parts)))
    for node in reversed(found):
        node.size = len(node.tokens) + sum(child.size for child in node.children)
    return roots


def _without_beginnings(
    rows: Sequence[np.ndarray], queries: Sequence[Queries]
) -> tuple[list[np.ndarray], list[Queries]]:
    """The rows in order, less those that another one begins with, which then has their queries too."""
    # Big-endian bytes are in the order of the tokens, and a beginning comes before the whole.
    keys = [np.asarray(row, ">u4").tobytes() for row in rows]
    kept: list[tuple[np.ndarray, list[Queries]]] = []
    behind = None
    for i in sorted(range(len(rows)), key=keys.__getitem__, reverse=True):
        if behind is not None and behind.startswith(keys[i]):
            kept[-1][1].append(queries[i])
        else:
            kept.append((np.asarray(rows[i], np.int32), [queries[i]]))
            behind = keys[i]
    kept.reverse()
    return [row for row, _ in kept], [Queries.joined(parts) for _, parts in kept]


def _shared_length(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size
