import itertools

import numpy as np
import pytest

from llm_jax.core.randomness import RowRandom, scaled

ROWS = np.arange(20_000, dtype=np.int64)


def draws(random, allowed):
    sizes = np.minimum(3, allowed.sum(axis=1))
    return {
        "bits": random.bits("a", 7),
        "below": random.below("b", 10),
        "happens": random.happens("c", 0.3),
        "subset": random.subset("d", allowed, sizes, 3),
        "order": random.order("e", allowed, allowed.shape[1])[:, :1],
    }


@pytest.mark.parametrize("num_items", [20, 5000])
def test_a_row_draws_the_same_in_any_batch(num_items):
    rows = np.array([5, 17, 3, 2**40, 17])
    allowed = np.random.default_rng(0).random((5, num_items)) < 0.7
    allowed[4] = allowed[1]
    whole = draws(RowRandom(1, rows), allowed)
    for chosen in ([3, 0], [1]):
        part = draws(RowRandom(1, rows[chosen]), allowed[chosen])
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][chosen], err_msg=name)
    for values in whole.values():
        np.testing.assert_array_equal(values[1], values[4])


def test_seed_row_and_draw_each_matter_and_nothing_else_does():
    bits = RowRandom(7, np.array([123456789])).bits("mask", 4)
    assert bits.tolist() == [[1527263535, 2811676295, 3438599690, 1340438804]]
    for other in (
        RowRandom(8, np.array([123456789])).bits("mask", 4),
        RowRandom(7, np.array([123456790])).bits("mask", 4),
        RowRandom(7, np.array([123456789])).bits("mask 2", 4),
    ):
        assert not (other == bits).any()


def test_a_longer_draw_begins_like_a_shorter_one():
    random = RowRandom(0, ROWS[:10])
    np.testing.assert_array_equal(random.bits("x", 9)[:, :4], random.bits("x", 4))


def test_bits_are_uniform_and_unrelated():
    bits = RowRandom(0, ROWS).bits("x", 6)
    ones = np.unpackbits(bits.astype("<u4").view(np.uint8), bitorder="little").reshape(-1, 32)
    assert np.abs(ones.mean(axis=0) - 0.5).max() < 0.01
    uniform = bits / 2**32
    correlation = np.corrcoef(uniform, rowvar=False) - np.eye(6)
    assert np.abs(correlation).max() < 0.03  # between numbers of a row
    assert abs(np.corrcoef(uniform[1:, 0], uniform[:-1, 0])[0, 1]) < 0.03  # and between rows


def test_below_and_happens_keep_their_bounds_and_shares():
    random = RowRandom(3, ROWS)
    counts = np.bincount(random.below("die", 6), minlength=7)
    assert counts[6] == 0
    assert np.abs(counts[:6] / len(ROWS) - 1 / 6).max() < 0.01
    bounds = np.tile([0, 1, 3], len(ROWS) // 3 + 1)[: len(ROWS)]
    drawn = random.below("bounds", bounds)
    assert (drawn < np.maximum(bounds, 1)).all()
    assert drawn.max() == 2
    assert scaled(np.array([2**32 - 1, 0], np.uint32), 10).tolist() == [9, 0]
    assert abs(random.happens("coin", 0.3).mean() - 0.3) < 0.01
    assert not random.happens("never", 0.0).any()
    assert random.happens("always", 1.0).all()


def test_every_subset_is_as_likely():
    allowed = np.tile([True, False, True, True, True, True], (len(ROWS), 1))
    chosen = RowRandom(0, ROWS).subset("s", allowed, np.full(len(ROWS), 2), 2)
    assert (np.diff(chosen) > 0).all()
    pairs = list(itertools.combinations([0, 2, 3, 4, 5], 2))
    counts = [(chosen == pair).all(axis=1).sum() for pair in pairs]
    assert sum(counts) == len(ROWS)
    expected = len(ROWS) / len(pairs)
    assert ((np.array(counts) - expected) ** 2 / expected).sum() < 28  # chi square, 9: p = 0.001


@pytest.mark.parametrize("num_items", [40, 5000])
def test_subsets_have_their_sizes_and_only_what_is_allowed(num_items):
    rng = np.random.default_rng(0)
    allowed = rng.random((200, num_items)) < rng.random((200, 1))
    sizes = np.minimum(rng.integers(0, 9, 200), allowed.sum(axis=1))
    chosen = RowRandom(0, ROWS[:200]).subset("s", allowed, sizes, 8)
    for row, size, marked in zip(chosen, sizes, allowed, strict=True):
        assert (row[size:] == num_items).all()
        assert len(set(row[:size])) == size
        assert marked[row[:size]].all()
        assert (np.diff(row[:size]) > 0).all()


def test_order_is_a_permutation_of_what_is_allowed():
    allowed = np.random.default_rng(1).random((500, 12)) < 0.5
    order = RowRandom(0, ROWS[:500]).order("o", allowed, 12)
    firsts = []
    for row, marked in zip(order, allowed, strict=True):
        count = marked.sum()
        assert sorted(row[:count]) == np.flatnonzero(marked).tolist()
        if count == 6:
            firsts.append(np.searchsorted(np.flatnonzero(marked), row[0]))
    assert np.bincount(firsts, minlength=6).min() > 0


def test_nothing_to_choose_from():
    none = np.zeros((3, 0), bool)
    assert RowRandom(0, ROWS[:3]).subset("s", none, np.zeros(3, int), 0).shape == (3, 0)
    some = np.ones((3, 4), bool)
    assert RowRandom(0, ROWS[:3]).subset("s", some, np.zeros(3, int), 0).shape == (3, 0)
    assert RowRandom(0, ROWS[:0]).bits("s", 4).shape == (0, 4)
