import jax
import numpy as np
import pytest
from fake_text import CLS, SEP, FakeModel, FakeTokenizer, documents_in_rows, make_batch, shapes_of

from llm_jax.core.packing import next_token_batch
from llm_jax.objectives import causal_lm, prefix_lm

TOKENIZER = FakeTokenizer([f" {i}" for i in range(50)])


def rows_of(count=64, length=65, **options):
    return documents_in_rows(count, length, TOKENIZER.first, TOKENIZER.vocab_size, **options)


def batch_of(rows, row_ids=None, **config):
    return make_batch(prefix_lm.make(prefix_lm.Config(**config)), TOKENIZER, rows, row_ids)


def documents(batch, row):
    """The columns of each document of a row."""
    ids = batch["segment_ids"][row]
    return [np.flatnonzero(ids == i) for i in range(1, ids.max() + 1)]


def test_batch_spec_is_what_the_transform_makes():
    spec = prefix_lm.make(prefix_lm.Config()).batch_spec(64, 64)
    assert shapes_of(spec) == shapes_of(batch_of(rows_of()))


def test_each_document_begins_with_a_prefix_that_is_no_target():
    rows = rows_of()
    batch, causal = batch_of(rows), next_token_batch(rows, CLS, SEP)
    for name in ("tokens", "targets", "segment_ids", "positions"):
        np.testing.assert_array_equal(batch[name], causal[name])
    assert not batch["prefix"][batch["segment_ids"] == 0].any()
    for row in range(len(rows)):
        for columns in documents(batch, row):
            size = int(batch["prefix"][row, columns].sum())
            assert 1 <= size <= max(len(columns) - 1, 1)
            assert batch["prefix"][row, columns[:size]].all()
            weights = batch["loss_weights"][row, columns]
            assert not weights[: size - 1].any()
            np.testing.assert_array_equal(
                weights[size - 1 :], causal["loss_weights"][row, columns[size - 1 :]]
            )


def test_what_is_in_sight_is_no_target():
    """By the rule of the mask: a key is seen that does not lie after the query or is marked."""
    batch = batch_of(rows_of())
    position, marked = batch["positions"], batch["prefix"] > 0
    same = batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None]
    sees = same & ((position[:, :, None] >= position[:, None]) | marked[:, None])
    targeted = batch["loss_weights"][:, :-1] > 0
    next_one = np.arange(63)
    assert not sees[:, next_one, next_one + 1][targeted & same[:, next_one, next_one + 1]].any()
    # And every document is predicted from some place on.
    for row in range(64):
        for columns in documents(batch, row):
            if len(columns) > 2:
                assert batch["loss_weights"][row, columns].any()


def test_every_cut_is_as_likely():
    rows = np.tile(np.array([[CLS, 9, 9, SEP, CLS, 9, 9, 9, 9, SEP, CLS]], np.int32), (20_000, 1))
    batch = batch_of(rows)
    sizes = [batch["prefix"][:, columns].sum(axis=1) for columns in documents(batch, 0)]
    assert np.bincount(sizes[0])[1:] / len(rows) == pytest.approx(np.full(3, 1 / 3), abs=0.02)
    assert np.bincount(sizes[1])[1:] / len(rows) == pytest.approx(np.full(5, 1 / 5), abs=0.02)
    assert abs(np.corrcoef(*sizes)[0, 1]) < 0.03


def test_a_row_is_the_same_in_any_batch():
    rows = rows_of()
    whole = batch_of(rows)
    for ids in (np.array([3]), np.array([40, 2, 63, 2])):
        part = batch_of(rows[ids], ids)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][ids], err_msg=name)
    assert (batch_of(rows, seed=1)["prefix"] != whole["prefix"]).any()
    assert (batch_of(rows, np.arange(64) + 64)["prefix"] != whole["prefix"]).any()


def test_one_id_as_bos_and_eos():
    class Gpt2(FakeTokenizer):
        eos_id = CLS

    rows = rows_of()
    rows[rows == SEP] = CLS
    made = prefix_lm.make(prefix_lm.Config())
    batch = make_batch(made, Gpt2([f" {i}" for i in range(50)]), rows)
    causal = next_token_batch(rows, CLS, CLS)
    assert (batch["loss_weights"] <= causal["loss_weights"]).all()


def test_the_loss_is_that_of_next_tokens_outside_the_prefix():
    model, batch = FakeModel(TOKENIZER.vocab_size), batch_of(rows_of(8, 33))
    ours, causal = (
        jax.jit(lambda b, o=o: o.loss(model, b, key=None, train=True))(batch)
        for o in (prefix_lm.make(prefix_lm.Config()), causal_lm.make(causal_lm.Config()))
    )
    assert float(ours.loss.sum) == float(causal.loss.sum)
    assert float(ours.loss.weight) == batch["loss_weights"].sum() > 0


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"z_loss -0\.1 must not be negative"):
        prefix_lm.Config(z_loss=-0.1)
