import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.split import held_out_threshold, is_held_out

TEXTS = [f"document {i}".encode() for i in range(5000)]


def test_the_share_held_out_is_the_fraction():
    threshold = held_out_threshold(len(TEXTS), 0.1)
    held = sum(is_held_out(text, threshold) for text in TEXTS)
    assert 420 < held < 580


def test_the_choice_is_the_same_for_ever():
    threshold = held_out_threshold(10**6, 0.01)
    chosen = [i for i, text in enumerate(TEXTS) if is_held_out(text, threshold)]
    assert chosen[:5] == [609, 665, 773, 860, 870]


def test_a_lower_fraction_holds_out_a_subset():
    low, high = (held_out_threshold(10**6, f) for f in (0.01, 0.03))
    assert all(is_held_out(t, high) for t in TEXTS if is_held_out(t, low))


def test_small_sources_hold_out_some_and_large_ones_at_most_so_many():
    assert held_out_threshold(100, 0.01) == int(0.08 * 2**64)
    assert held_out_threshold(3, 0.01) == int(0.25 * 2**64)
    assert held_out_threshold(10**6, 0.01, at_most=100) == int(1e-4 * 2**64)
    assert held_out_threshold(100, 0.0) == 0
    assert not any(is_held_out(text, 0) for text in TEXTS)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError, match="held_out_fraction"):
        held_out_threshold(10, fraction)
