import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.shuffle import EndlessOrder, GroupedOrder, derive_seed, permute


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**70), 2**70))
def test_permute_is_a_bijection(size, seed):
    result = permute(np.arange(size), size, seed)
    np.testing.assert_array_equal(np.sort(result), np.arange(size))


@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_permute_of_a_huge_range_stays_inside_and_apart(size, indices):
    chosen = np.unique(np.array(indices) % size)
    result = permute(chosen, size, 7)
    assert result.min() >= 0
    assert result.max() < size
    assert len(np.unique(result)) == len(chosen)


def test_permute_is_the_same_for_ever():
    # Shards and resumed runs of earlier versions depend on these very numbers.
    assert permute(np.arange(10), 10, 0).tolist() == [1, 8, 6, 5, 4, 9, 2, 0, 7, 3]
    assert permute(np.array([0, 1, 999_999_999]), 10**9, 3).tolist() == [
        422590472,
        162187539,
        615108798,
    ]
    assert derive_seed(0, "a source with a long name", -1) == 8178750877502095772


def test_a_shuffle_leaves_no_trace_of_the_order():
    result = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(np.arange(10_000), result)[0, 1]) < 0.05
    gaps = np.abs(np.diff(result))
    assert abs(gaps.mean() - 10_000 / 3) < 150  # of two uniform draws


def test_every_epoch_has_everything_once_in_another_order():
    order = EndlessOrder(37, 0, "x")
    walk = order(np.arange(37 * 3)).reshape(3, 37)
    np.testing.assert_array_equal(np.sort(walk, axis=1), np.tile(np.arange(37), (3, 1)))
    assert (walk[0] != walk[1]).any()
    assert (walk[0] != EndlessOrder(37, 0, "y")(np.arange(37))).any()
    assert (walk[0] != EndlessOrder(37, 1, "x")(np.arange(37))).any()


def test_a_walk_does_not_depend_on_how_it_is_asked_for():
    order = EndlessOrder(37, 0, "x")
    numbers = np.array([80, 3, 36, 37, 110, 0])
    np.testing.assert_array_equal(order(numbers), np.concatenate([order(n[None]) for n in numbers]))
    assert order(np.zeros(0, np.int64)).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum))
def test_groups_stay_together(sizes):
    starts = np.cumsum([0, *sizes])
    order = GroupedOrder(starts, 0, "x")
    walk = order(np.arange(starts[-1] * 2)).reshape(2, -1)
    np.testing.assert_array_equal(np.sort(walk, axis=1), np.tile(np.arange(starts[-1]), (2, 1)))
    groups = np.searchsorted(starts, walk, side="right") - 1
    for epoch in groups:
        borders = 1 + np.count_nonzero(np.diff(epoch))
        assert borders == len(np.unique(epoch))
