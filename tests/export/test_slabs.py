"""Pieces of arrays in another order of axes are those of a plain copy."""

import numpy as np
import pytest

from llm_jax.export import slabs as module
from llm_jax.export.slabs import slabs


def views():
    x = np.random.default_rng(0).standard_normal((600, 300)).astype(np.float32)
    y = np.arange(5 * 7 * 11, dtype=np.int32).reshape(5, 7, 11)
    return {
        "in order": x,
        "transposed": x.T,
        "a part of it": x.T[3:290, 5:],
        "backwards": x.T[::-1],
        "three axes": y.transpose(2, 0, 1),
        "a row": x[:, 3],
        "one number": np.float32(3.0).reshape(()),
        "nothing": np.zeros((0, 4), np.float32).T,
        "two bytes": x.astype(np.float16).T,
    }


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("size", [2**23, 4000, 1])
def test_pieces_are_the_array_in_order(monkeypatch, name, size):
    monkeypatch.setattr(module, "_BYTES", size)
    x = views()[name]
    parts = [np.array(part) for part in slabs(x)]
    assert all(part.flags.c_contiguous for part in slabs(x))
    np.testing.assert_array_equal(
        np.concatenate([np.atleast_1d(p) for p in parts]).reshape(x.shape), x
    )


def test_what_is_in_order_is_not_copied():
    x = np.zeros((4, 4))
    assert np.shares_memory(next(slabs(x)), x)
