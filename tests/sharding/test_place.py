import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from llm_jax.sharding.place import RowShare, row_share, share_of, to_global_batch
from llm_jax.sharding.rules import AxisRules


def rules(order, shape=(1, 8, 1)):
    devices = np.array(jax.devices())[list(order)].reshape(shape)
    axes = ("data", "fsdp", "tensor")
    return AxisRules(Mesh(devices, axes, axis_types=(AxisType.Auto,) * 3))


@pytest.mark.parametrize("order", [range(8), [5, 0, 3, 7, 1, 2, 6, 4]])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_any_order_of_devices_holds_the_batch(order, shape):
    batch = {"x": np.arange(16 * 3, dtype=np.int32).reshape(16, 3), "y": np.arange(16.0)}
    placed = to_global_batch(batch, rules(order, shape), 16)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
    assert row_share(rules(order, shape), 16) == RowShare(0, 1)


def piece(*rows):
    return [(row, row + 1) for row in rows]


def test_rows_of_a_pod_slice_are_not_contiguous():
    # As mesh_utils orders a v5e-16: four hosts of 2 x 2 chips on a 4 x 4 torus.
    rows = {
        0: piece(0, 1, 6, 15),
        1: piece(2, 3, 4, 5),
        2: piece(7, 8, 13, 14),
        3: piece(9, 10, 11, 12),
    }
    assert [share_of(p, rows) for p in range(4)] == [RowShare(i, 4) for i in range(4)]


def test_processes_with_the_same_rows_share_a_share():
    rows = {0: piece(0, 2), 1: piece(0, 2), 2: piece(1, 3), 3: piece(1, 3)}
    assert [share_of(p, rows) for p in range(4)] == [RowShare(i, 2) for i in (0, 0, 1, 1)]


@pytest.mark.parametrize("rows", [{0: piece(0, 1), 1: piece(1, 2)}, {0: piece(0), 1: piece(1, 2)}])
def test_rows_that_overlap_in_part_are_refused(rows):
    with pytest.raises(ValueError, match="unequal or overlapping rows"):
        share_of(0, rows)
