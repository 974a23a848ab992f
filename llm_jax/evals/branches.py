"""Branches of a prefix tree packed into rows, as documents are in training.

A branch is a node with all that is below it. In a row its tokens stand depth first, so that a token is seen
by those behind it up to the end of its node's branch, and by no others: a question and all its choices are
one row's part, and go through the model once, without a cache. What stands above branches that are too
large for a row together is a trunk: it goes through the model by itself, and rows of branches stand behind its
keys.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from llm_jax.evals.prefix_tree import Node

_OPEN_ROWS = 64  # that are looked at for room


@dataclasses.dataclass(frozen=True)
class Run:
    """A node's tokens at the places from `start` on of a row; tokens before the place `until` see them."""

    node: Node
    start: int
    until: int
    segment: int


@dataclasses.dataclass(eq=False)
class Row:
    """What goes through the model in one row, behind the first `above` tokens of the cache's row `parent`.

    branches: whether tokens must not see all that stand before them in their segment.
    """

    parent: int
    above: int
    runs: list[Run] = dataclasses.field(default_factory=list)
    length: int = 0
    branches: bool = False

    def add(self, branch: Node, segment: int) -> None:
        todo = [branch]
        while todo:
            node = todo.pop()
            self._append(node, segment)
            todo.extend(reversed(node.children))
        self.branches |= bool(branch.children)

    def add_trunk(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self._append(node, 1)

    def _append(self, node: Node, segment: int) -> None:
        self.runs.append(Run(node, self.length, self.length + node.size, segment))
        self.length += len(node.tokens)


def pack(branches: Iterable[tuple[Node, int]], row_tokens: int, *, behind: bool) -> list[Row]:
    """Rows of `row_tokens` at most, or of one branch that is longer; branches with their parents' rows.

    behind: whether there is a cache. Its tokens are of segment 1, and so are these then; else each branch is
      a segment, and branches without branching have rows of their own, which every kernel can take.
    """
    open_rows: dict[tuple, collections.deque[Row]] = collections.defaultdict(
        lambda: collections.deque(maxlen=_OPEN_ROWS)
    )
    rows: list[Row] = []
    for node, parent in sorted(branches, key=lambda branch: -branch[0].size):
        kind = (parent, node.start) if behind else bool(node.children)
        fits = (row for row in open_rows[kind] if row.length + node.size <= row_tokens)
        row = next(fits, None)
        if row is None:
            row = Row(parent, node.start, branches=behind)
            rows.append(row)
            open_rows[kind].append(row)
        row.add(node, 1 if behind else row.runs[-1].segment + 1 if row.runs else 1)
    return rows


def trunk(node: Node, room: int) -> tuple[list[Node], list[Node]]:
    """(the way from a node down along the largest branches that do not fit in a row, all that leave it)."""
    way, leaving = [node], []
    while True:
        children = sorted(way[-1].children, key=lambda child: -child.size)
        if not children or children[0].size <= room:
            return way, leaving + way[-1].children
        way.append(children[0])
        leaving += children[1:]
