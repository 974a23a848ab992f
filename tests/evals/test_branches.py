"""Rows of branches: every token stands once, and is seen by its own branch alone."""

import itertools

import numpy as np
import pytest

from llm_jax.evals.branches import pack, trunk
from llm_jax.evals.prefix_tree import Queries, prefix_tree


def tree(rng, count=40):
    """Of rows that share beginnings of many lengths."""
    stem, rows = rng.integers(0, 9, 40), []
    for _ in range(count):
        kept = stem[: rng.integers(0, 40)]
        rows.append(
            np.concatenate([kept, rng.integers(0, 9, rng.integers(1, 12))]).astype(np.int32)
        )
        if rng.random() < 0.3:
            stem = np.concatenate([rows[-1], rng.integers(0, 9, 40)])[:40]
    queries = [
        Queries(np.array([len(row) - 1]), np.array([i]), np.array([i]))
        for i, row in enumerate(rows)
    ]
    return prefix_tree(rows, queries, min_shared=3)


def below(node):
    return {node}.union(*map(below, node.children))


def small(nodes):
    """Branches of 64 tokens at most, and what is left of larger ones."""
    for node in nodes:
        yield from small(node.children) if node.size > 64 and node.children else [node]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_token_is_seen_by_its_own_branch(seed, behind):
    rng = np.random.default_rng(seed)
    branches = [(node, int(rng.integers(0, 3))) for node in small(tree(rng))]
    assert any(node.children for node, _ in branches)
    rows = pack(branches, 64, behind=behind)
    placed = [run.node for row in rows for run in row.runs]
    assert len(placed) == len(set(placed))
    assert set(placed) == set().union(*(below(node) for node, _ in branches))
    parents = dict(branches)
    filled: dict[tuple, list[int]] = {}
    for row in rows:
        top = row.runs[0].node
        kind = (row.parent, row.above) if behind else bool(top.children)
        filled.setdefault(kind, []).append(row.length)
    # First fit: no two rows of a kind would have gone into one.
    assert all(a + b > 64 for of in filled.values() for a, b in itertools.combinations(of, 2))
    for row in rows:
        tops = [run.node for run in row.runs if run.node in parents]
        assert row.length <= 64 or len(tops) == 1
        assert row.length == sum(node.size for node in tops)
        if behind:
            assert {parents[node] for node in tops} == {row.parent}
            assert {run.segment for run in row.runs} == {1}
        else:
            assert len({bool(node.children) for node in tops}) == 1
            assert len({run.segment for run in row.runs}) == len(tops)
        for seen in row.runs:
            branch = below(seen.node)
            for run in row.runs:
                inside = seen.start <= run.start < seen.until
                assert inside == (run.node in branch)


def test_a_trunk_is_the_way_along_what_is_too_large_for_a_row():
    rng = np.random.default_rng(1)
    (root, *_) = sorted(tree(rng), key=lambda node: -node.size)
    way, leaving = trunk(root, 40)
    assert way[0] is root
    assert len(way) > 1
    assert all(child in node.children for node, child in itertools.pairwise(way))
    assert all(node.size > 40 for node in way)
    assert all(child.size <= 40 for child in way[-1].children)
    nodes = [*way, *(other for node in leaving for other in below(node))]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == below(root)
