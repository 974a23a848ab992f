import numpy as np
import pytest
from fake_text import CLS, PAD, SEP, FakeTokenizer, documents_in_rows

from llm_jax.core.pieces import Pieces
from llm_jax.core.randomness import RowRandom
from llm_jax.objectives.sentence_pairs import NUM_SPECIAL, PairMaker, Pairs, Spans, lay_out

PLAIN = FakeTokenizer([f" {i}" for i in range(40)])
PROSE = FakeTokenizer([" a", " the", " word", "s", "ing", " of", "ed", " x", " of", ".", "\n"])
KINDS = ["next_sentence", "sentence_order"]


class Decided(RowRandom):
    """Labels are what the test says."""

    label = True

    def happens(self, draw, probability):
        happens = super().happens(draw, probability)
        return np.full_like(happens, self.label) if draw == "label" else happens


def make_pairs(
    kind, rows, partners=None, *, tokenizer=PLAIN, short=0.0, ids=None, random=RowRandom
):
    maker = PairMaker(Pieces.of(tokenizer), (CLS, SEP), short)
    drawn = random(0, np.arange(len(rows)) if ids is None else ids)
    if kind == "sentence_order":
        return maker.sentence_order(rows, drawn)
    return maker.next_sentence(rows, partners, drawn)


def windows(tokenizer=PLAIN, count=400, length=40, **options):
    return [
        documents_in_rows(count, length, tokenizer.first, tokenizer.vocab_size, seed=s, **options)
        for s in (0, 1)
    ]


def halves(pairs: Pairs, row: int):
    return [
        pairs.text[row, spans.start[row] : spans.end[row]] for spans in (pairs.first, pairs.second)
    ]


@pytest.mark.parametrize("tokenizer", [PLAIN, PROSE])
@pytest.mark.parametrize("short", [0.0, 1.0])
def test_next_sentence_follows_or_comes_from_the_partner(tokenizer, short):
    rows, partners = windows(tokenizer)
    length = rows.shape[1]
    pairs = make_pairs("next_sentence", rows, partners, tokenizer=tokenizer, short=short)
    for row in range(len(rows)):
        first, second = halves(pairs, row)
        assert (first >= tokenizer.first).all()  # inside one document
        assert (second >= tokenizer.first).all()
        assert len(first) + len(second) <= length
        if pairs.labels[row]:
            assert pairs.second.start[row] >= length
        else:
            assert pairs.second.start[row] == pairs.first.end[row]
        if pairs.usable[row]:
            assert len(first) > 0
            assert len(second) > 0
    assert (pairs.first.size > 0).sum() == (rows >= tokenizer.first).any(axis=1).sum()
    assert not pairs.labels[~pairs.usable].any()
    assert pairs.labels[pairs.usable].mean() == pytest.approx(0.5, abs=0.07)
    assert pairs.usable.mean() > 0.8


@pytest.mark.parametrize("tokenizer", [PLAIN, PROSE])
def test_only_the_texts_tell_a_random_second(tokenizer):
    rows, partners = windows(tokenizer, mean=60)
    follows, random = (
        make_pairs(
            "next_sentence",
            rows,
            partners,
            tokenizer=tokenizer,
            random=type("D", (Decided,), {"label": x}),
        )
        for x in (False, True)
    )
    np.testing.assert_array_equal(follows.usable, random.usable)
    assert not follows.labels.any()
    np.testing.assert_array_equal(random.labels, random.usable)
    for name in ("start", "size"):
        np.testing.assert_array_equal(getattr(follows.first, name), getattr(random.first, name))
    np.testing.assert_array_equal(follows.second.size, random.second.size)
    # Where the pieces have sentences, both kinds start with one, nearly always.
    if tokenizer is PROSE:
        for pairs in (follows, random):
            starts = Pieces.of(tokenizer).start_sentences(pairs.text)
            starts |= np.roll(pairs.text == CLS, 1, axis=1)
            at_second = starts[np.arange(len(rows)), pairs.second.start % pairs.text.shape[1]]
            assert at_second[pairs.usable].mean() > 0.9


def test_rows_inside_one_document_are_full():
    rows, partners = (
        np.random.default_rng(s).integers(PLAIN.first, PLAIN.vocab_size, (200, 50)).astype(np.int32)
        for s in (0, 1)
    )
    pairs = make_pairs("next_sentence", rows, partners)
    assert (pairs.first.size + pairs.second.size == 50).all()
    splits = np.bincount(pairs.first.size, minlength=51)
    assert splits[0] == splits[50] == 0
    assert splits[1:25].sum() == pytest.approx(100, abs=30)
    short = make_pairs("next_sentence", rows, partners, short=1.0)
    total = short.first.size + short.second.size
    assert total.min() >= 2
    assert total.mean() == pytest.approx(26, abs=3)


@pytest.mark.parametrize("tokenizer", [PLAIN, PROSE])
@pytest.mark.parametrize("short", [0.0, 1.0])
def test_sentence_order_swaps_neighbours(tokenizer, short):
    rows, _ = windows(tokenizer)
    kept, swapped = (
        make_pairs(
            "sentence_order",
            rows,
            tokenizer=tokenizer,
            short=short,
            random=type("D", (Decided,), {"label": x}),
        )
        for x in (False, True)
    )
    for row in range(len(rows)):
        first, second = halves(kept, row)
        assert (first >= tokenizer.first).all()
        assert (second >= tokenizer.first).all()
        assert kept.second.start[row] == kept.first.end[row]
        if kept.usable[row]:
            assert [x.tolist() for x in halves(swapped, row)] == [second.tolist(), first.tolist()]
            assert len(first) > 0
            assert len(second) > 0
    np.testing.assert_array_equal(swapped.labels, swapped.usable)
    assert not kept.labels.any()
    drawn = make_pairs("sentence_order", rows, tokenizer=tokenizer, short=short)
    assert drawn.labels[drawn.usable].mean() == pytest.approx(0.5, abs=0.07)


def test_swapped_texts_are_whole_sentences():
    """Else a text that starts in the middle would tell that it is the first."""
    rows, _ = windows(PROSE, mean=200, padded=False)
    pairs = make_pairs("sentence_order", rows, tokenizer=PROSE)
    starts = Pieces.of(PROSE).start_sentences(rows)
    starts[:, 1:] |= rows[:, :-1] == CLS
    ends = np.concatenate([starts, np.zeros((len(rows), 1), bool)], axis=1)
    ends[:, :-1] |= rows == SEP
    numbers = np.arange(len(rows))
    for spans in (pairs.first, pairs.second):
        good = starts[numbers, np.minimum(spans.start, 39)] & ends[numbers, spans.end]
        assert good[pairs.usable].mean() > 0.9


def test_words_are_not_cut_where_there_are_no_sentences():
    tokenizer = FakeTokenizer([" a", "s", "ing"])
    rows, _ = windows(tokenizer, mean=200, padded=False)
    goes_on = Pieces.of(tokenizer).continue_words(rows)
    for kind in KINDS:
        pairs = make_pairs(kind, rows, rows, tokenizer=tokenizer)
        starts = [pairs.first.start, pairs.second.start % rows.shape[1]]
        if kind == "sentence_order":
            assert not goes_on[np.arange(len(rows)), starts[0]][pairs.usable].any()
        assert not goes_on[np.arange(len(rows)), starts[1]][pairs.usable].any()


def test_each_document_of_a_row_has_its_turn():
    row = (
        [PLAIN.first] * 5 + [SEP, CLS] + [PLAIN.first + 1] * 10 + [SEP, CLS] + [PLAIN.first + 2] * 5
    )
    rows = np.tile(np.array(row, np.int32), (4000, 1))
    pairs = make_pairs("sentence_order", rows)
    which = rows[np.arange(4000), pairs.first.start] - PLAIN.first
    assert np.bincount(which) / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_too_little_text(kind):
    text = PLAIN.first
    rows = np.array(
        [[text, -1, -1], [CLS, SEP, -1], [-1] * 3, [SEP, CLS, text], [text] * 3], np.int32
    )
    partners = np.array([[text] * 3, [text] * 3, [text] * 3, [text] * 3, [-1] * 3], np.int32)
    pairs = make_pairs(kind, rows, partners)
    assert pairs.usable.tolist() == [False] * 4 + [kind == "sentence_order"]
    batch = lay_out(pairs, CLS, SEP, PAD, 6)
    assert batch["tokens"][0].tolist() == [CLS, text, SEP, SEP, PAD, PAD]
    assert not batch["segment_ids"][1:3].any()
    assert (batch["tokens"][1:3] == PAD).all()


def test_the_layout():
    text = np.array([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]], np.int32)
    pairs = Pairs(
        text,
        Spans(np.array([1, 3]), np.array([2, 3])),
        Spans(np.array([3, 0]), np.array([1, 3])),
        labels=np.array([0, 1], np.int32),
        usable=np.array([True, True]),
    )
    batch = lay_out(pairs, CLS, SEP, PAD, 6 + NUM_SPECIAL)
    assert batch["tokens"].tolist() == [
        [CLS, 11, 12, SEP, 13, SEP, PAD, PAD, PAD],
        [CLS, 23, 24, 25, SEP, 20, 21, 22, SEP],
    ]
    assert batch["token_types"].tolist() == [[0] * 4 + [1] * 2 + [0] * 3, [0] * 5 + [1] * 4]
    assert batch["segment_ids"].tolist() == [[1] * 6 + [0] * 3, [1] * 9]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0, 0], list(range(9))]
    assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}
