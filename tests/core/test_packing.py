import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import packing
from llm_jax.core.packing import next_token_batch, segments_and_positions

BOS, EOS = 1, 2


def plain_segments_and_positions(tokens: np.ndarray, bos_id: int) -> tuple[list, list]:
    """One token at a time, as the definition says."""
    segment_ids, positions = [], []
    for row in tokens:
        segment, position = 1, 0
        for place, token in enumerate(row):
            if token == bos_id and place > 0:
                segment, position = segment + 1, 0
            segment_ids.append(segment if token >= 0 else 0)
            positions.append(position if token >= 0 else 0)
            position += 1
    return segment_ids, positions


@st.composite
def padded_rows(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(0, 4), min_size=batch * length, max_size=batch * length))
    rows = np.array(ids, np.int32).reshape(batch, length)
    for row in rows:
        row[draw(st.integers(0, length)) :] = -1
    return rows


@settings(max_examples=150, deadline=None)
@given(padded_rows())
def test_segments_follow_the_definition(rows):
    segment_ids, positions = segments_and_positions(rows, BOS)
    expected = plain_segments_and_positions(rows, BOS)
    assert (segment_ids.ravel().tolist(), positions.ravel().tolist()) == expected
    assert segment_ids.dtype == positions.dtype == np.int32


@settings(max_examples=100, deadline=None)
@given(padded_rows(), st.sampled_from([EOS, BOS]))
def test_weights_are_where_a_target_can_be_predicted(rows, eos):
    if rows.shape[1] < 2:
        return
    batch = next_token_batch(rows, BOS, eos)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1] - 1):
            token, target = rows[b, t], rows[b, t + 1]
            opens = target == BOS and eos != BOS
            assert batch["loss_weights"][b, t] == float(token >= 0 and target >= 0 and not opens)
            assert batch["tokens"][b, t] == max(token, 0)
            assert batch["targets"][b, t] == max(target, 0)


def test_shapes_and_dtypes():
    rows = np.arange(3, 3 + 2 * 9, dtype=np.int32).reshape(2, 9)
    batch = next_token_batch(rows, BOS, EOS)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, (2, 8))
    assert batch["loss_weights"].dtype == np.float32
    assert all(v.dtype == np.int32 for k, v in batch.items() if k != "loss_weights")


@pytest.mark.parametrize("eos", [BOS, EOS])
def test_the_rows_given_are_not_changed(eos):
    rows = np.array([[BOS, 5, EOS, BOS, 6, -1]], np.int32)
    before = rows.copy()
    batch = next_token_batch(rows, BOS, eos)
    batch["tokens"][:] = 99
    batch["targets"][:] = 99
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("per_row", [1, 3])
def test_examples_stand_one_after_another_in_their_rows(per_row):
    rng = np.random.default_rng(per_row)
    examples = [rng.integers(5, 50, rng.integers(0, 5)).tolist() for _ in range(4 * per_row)]
    layout = packing.RowLayout.of([len(x) for x in examples], per_row, 14)
    tokens = layout.filled(examples, -7)
    for row in range(4):
        at = 0
        for number, example in enumerate(examples[row * per_row : (row + 1) * per_row]):
            place = slice(at, at + len(example))
            assert tokens[row, place].tolist() == example
            assert (layout.segment_ids[row, place] == number + 1).all()
            assert layout.positions[row, place].tolist() == list(range(len(example)))
            at += len(example)
        assert (tokens[row, at:] == -7).all()
        assert not layout.segment_ids[row, at:].any()
        assert not layout.positions[row, at:].any()
    assert {x.dtype.name for x in (tokens, layout.segment_ids, layout.positions)} == {"int32"}
    assert layout.filled(examples, 0, np.float32).dtype == np.float32


def test_rows_that_are_overfull_are_found():
    assert packing.overfull([3, 2, 1, 1, 4, 2], 2, 5).tolist() == [2]
    assert packing.overfull([], 2, 5).tolist() == []


def test_pad_rows():
    rows = packing.pad_rows([[1, 2], [], [3, 4, 5]], 3, 9)
    assert rows.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    assert packing.pad_rows([], 3, 9).shape == (0, 3)
