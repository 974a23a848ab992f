"""Times by arithmetic: attention that sees a window."""

import pytest

from llm_jax.core.config import load
from llm_jax.core.flops import keys_seen
from llm_jax.planner.pace import pace
from llm_jax.planner.placement import place
from llm_jax.planner.topology import parse_target
from llm_jax.training.config import resolve


def test_a_window_costs_the_keys_that_queries_see():
    sizes = ["model.max_length=8192", "data.sequence_length=8192", "model.remat=none"]

    def flops(window):
        run = resolve(load("configs/gpt_1b.py", [*sizes, *window]))
        return pace(run, place(run, parse_target("v5p:4x4x4"))).hardware_flops

    whole, half, tiny = (
        flops(w) for w in ([], ["model.attention_window=4096"], ["model.attention_window=1"])
    )
    seen = [keys_seen(8192, window, True) for window in (None, 4096, 1)]
    assert seen == [4096, pytest.approx(3072, rel=1e-3), 1]
    assert (half - tiny) / (whole - tiny) == pytest.approx((seen[1] - 1) / (seen[0] - 1))
