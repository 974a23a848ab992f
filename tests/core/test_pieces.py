import numpy as np
import pytest
from fake_text import FakeTokenizer

from llm_jax.core.pieces import Pieces
from llm_jax.data.tokenizers import raw_bytes

SPACED = [
    " the",
    " play",
    "ing",
    "ed",
    ".",
    " (",
    "foo",
    "_",
    "bar",
    ")",
    "\n",
    "\n    if",
    " é",
    "t",
]
SPACED += ["中", "文", "。", " e.g", "x\n", "'s", "!", " 3", "14"]
WORDPIECE = ["the", "play", "##ing", "##ed", ".", "un", "##play", "##able", "###", "3"]


def words(pieces, texts):
    tokenizer = FakeTokenizer(pieces)
    tokens = np.array([tokenizer.ids(*texts)], np.int32)
    goes_on = Pieces.of(tokenizer).continue_words(tokens)[0]
    joined = []
    for text, same in zip(texts, goes_on, strict=True):
        if same:
            joined[-1] += text
        else:
            joined.append(text)
    return joined


def sentences(pieces, texts):
    tokenizer = FakeTokenizer(pieces)
    tokens = np.array([tokenizer.ids(*texts)], np.int32)
    return np.flatnonzero(Pieces.of(tokenizer).start_sentences(tokens)[0]).tolist()


def test_words_of_pieces_with_spaces():
    texts = [" the", " play", "ing", ".", " play", "ed", " (", "foo", "bar", ")", "\n", "foo"]
    expected = [" the", " playing", ".", " played", " (", "foobar", ")", "\n", "foo"]
    assert words(SPACED, texts) == expected
    assert words(SPACED, [" é", "t", "t"]) == [" étt"]
    assert words(SPACED, ["foo", "中", "文", "bar"]) == ["foo", "中", "文", "bar"]
    meta = [text.replace(" ", "▁") for text in SPACED]
    assert words(meta, ["▁play", "ing", "▁play", "▁(", "foo"]) == ["▁playing", "▁play", "▁(", "foo"]


def test_words_of_wordpiece():
    texts = ["the", "un", "##play", "##able", "play", "##ed", ".", "3", "the"]
    assert words(WORDPIECE, texts) == ["the", "un##play##able", "play##ed", ".", "3", "the"]


def test_words_of_bytes():
    tokenizer = raw_bytes.make(raw_bytes.Config())
    text = "no café, 中文 x"
    tokens = np.array([tokenizer.encode(text)], np.int32)
    starts = np.flatnonzero(~Pieces.of(tokenizer).continue_words(tokens)[0])
    parts = np.split(tokens[0], starts[1:])
    assert [bytes(p.tolist()).decode() for p in parts] == [
        "no", " ", "café", ",", " ", "中", "文", " ", "x"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "texts", "starts"),
    [
        (SPACED, [" the", ".", " the", "!", " the", "\n", " the"], [2, 4, 6]),
        (SPACED, [" 3", ".", "14", "foo", "\n    if", " the", "x\n", "foo"], [4, 7]),
        (SPACED, ["中", "。", "文", " e.g", ".", "\n", "foo"], [2, 5, 6]),
        (WORDPIECE, ["the", "play", "##ing", ".", "the", "."], [4]),
    ],
)
def test_where_sentences_start(pieces, texts, starts):
    found = sentences(pieces, texts)
    assert [i for i in found if texts[i] != "\n"] == [i for i in starts if texts[i] != "\n"]


def test_special_tokens_and_padding_are_not_ordinary_and_part_words():
    tokenizer = FakeTokenizer(SPACED, sentinels=2)
    pieces = Pieces.of(tokenizer)
    assert pieces.ordinary_ids.tolist() == list(range(tokenizer.first, tokenizer.vocab_size))
    foo, bar = tokenizer.ids("foo", "bar")
    tokens = np.array([[1, foo, bar, 2, foo, -1]], np.int32)
    assert pieces.are_ordinary(tokens)[0].tolist() == [False, True, True, False, True, False]
    assert pieces.continue_words(tokens)[0].tolist() == [False, False, True, False, False, False]
