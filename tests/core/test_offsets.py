import numpy as np
import pytest
from record_cases import bytes_tokenizer, pieces_tokenizer, word_piece_tokenizer

from llm_jax.core.offsets import Offsets

TEXTS = [
    "the cat sat on a mat.",
    "café Köln — 日本 😀!",
    "  two  spaces\n\nand lines ",
    "",
]


@pytest.mark.parametrize(
    "tokenizer", [bytes_tokenizer(), pieces_tokenizer()], ids=["bytes", "pieces"]
)
@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_exact_where_nothing_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    spans = Offsets.of(tokenizer)(text, ids)
    assert spans.shape == (len(ids), 2)
    for i, (start, end) in zip(ids, spans, strict=True):
        piece = tokenizer.decode_bytes([i])
        assert piece in text[start:end].encode()  # a lone byte stands for its character
    covered = np.zeros(len(text), bool)
    for start, end in spans:
        covered[start:end] = True
    assert covered.all()


def test_a_dummy_prefix_is_no_character():
    class Prefixed:
        vocab_size = 3

        def decode_bytes(self, ids):
            return b"".join([b" ", b" a", b"b"][i] for i in ids)

    offsets = Offsets.of(Prefixed())
    assert offsets("ab", [1, 2]).tolist() == [[0, 1], [1, 2]]
    assert offsets("b", [0, 2]).tolist() == [[0, 0], [0, 1]]


def test_pieces_are_followed_where_case_accents_and_spaces_are_lost():
    tokenizer = word_piece_tokenizer()
    text = "The  Eiffel-Tower (1889) is in PARIS, Café 日x the."
    ids = tokenizer.encode(text)
    pieces = [tokenizer.id_to_piece(i) for i in ids]
    found = dict(zip(pieces, (text[a:b] for a, b in Offsets.of(tokenizer)(text, ids)), strict=True))
    assert found | {
        "eiffel": "Eiffel", "-": "-", "tower": "Tower", "(": "(", "1": "1", "paris": "PARIS",
        ",": ",", "cafe": "Café", "[UNK]": "日", "x": "x", "the": "the", ".": ".",
    } == found  # fmt: skip


def test_an_unknown_word_reaches_to_the_next_known_one():
    tokenizer = word_piece_tokenizer()
    text = "the zzz☃ tower ☃ ☃☃"
    ids = tokenizer.encode(text)
    assert [tokenizer.id_to_piece(i) for i in ids] == ["the", "[UNK]", "tower", "[UNK]", "[UNK]"]
    spans = [text[a:b] for a, b in Offsets.of(tokenizer)(text, ids)]
    assert spans == ["the", "zzz☃", "tower", "☃ ☃☃", "☃ ☃☃"]
