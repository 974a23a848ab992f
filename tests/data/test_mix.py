import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core.config import ConfigError
from llm_jax.data.mix import BLOCK, Mixture, block_counts

weights = st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda w: sum(w) > 1e-6)


@settings(max_examples=200, deadline=None)
@given(weights)
def test_counts_are_the_shares_rounded(weights):
    counts = block_counts(weights)
    exact = np.array(weights) / sum(weights) * BLOCK
    assert counts.sum() == BLOCK
    assert ((counts > 0) == (np.array(weights) > 0)).all()
    raised = np.count_nonzero(
        (np.array(weights) > 0) & (exact < 1)
    )  # each takes up to one row from the others
    assert (np.abs(counts - exact) <= 1 + raised).all()


@settings(max_examples=50, deadline=None)
@given(weights, st.integers(0, 5 * BLOCK))
def test_numbers_within_a_source_count_up_without_gaps(weights, start):
    mixture = Mixture(weights, seed=0)
    sources, turns = mixture(np.arange(start, start + 500))
    before = mixture.taken(start)
    for source in range(len(weights)):
        mine = turns[sources == source]
        np.testing.assert_array_equal(mine, before[source] + np.arange(len(mine)))
    after = before + np.bincount(sources, minlength=len(weights))
    np.testing.assert_array_equal(after, mixture.taken(start + 500))


def test_the_pattern_is_spread_and_seeded():
    first = Mixture([1.0, 1.0], 0)(np.arange(BLOCK))[0]
    assert 400 < np.count_nonzero(np.diff(first)) < 624
    assert (first != Mixture([1.0, 1.0], 1)(np.arange(BLOCK))[0]).any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [([-1.0, 2.0], "-1.0"), ([0.0], "weight 0"), ([1.0] * 1025, "1025"), ([float("nan")], "nan")],
)
def test_weights_that_cannot_be_mixed(weights, message):
    with pytest.raises(ConfigError, match=message):
        block_counts(weights)
