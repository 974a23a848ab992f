"""What the pieces of a tokenizer are to a text, as a table over ids, for whole batches at a time.

A word goes on where letters meet letters, so one rule serves pieces with a space before them
(SentencePiece, byte-level BPE), bytes, and pieces that hold several words; in a WordPiece vocabulary
"##" marks what goes on. Ideographs and punctuation are words of their own, as in BERT. A sentence ends
with its line, and at ".", "!" or "?" before a space.
"""

import dataclasses
import unicodedata

import numpy as np

from llm_jax.core.types import Tokenizer

_ORDINARY, _JOINS_LEFT, _JOINS_RIGHT, _SPACE, _STOP, _ENDS_LINE, _BEGINS_LINE = (
    1 << i for i in range(7)
)
_META_SPACE = "▁"
_CONTINUATION = "##"
_STOPS = (".", "!", "?")
_IDEOGRAPHS = (("\u3400", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
_FULL_STOPS = ("。", "！", "？")  # no space follows these


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Tables of one tokenizer.

    flags: [V + 1] uint8, what is known of each id; id -1 is padding, of which nothing is.
    ordinary_ids: [O] int32, the ids that text is made of.
    """

    flags: np.ndarray
    ordinary_ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Pieces":
        """Special tokens are the ids whose bytes are none; bos, eos and pad in any case."""
        pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        for special in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
            pieces[special] = b""
        texts = [piece.decode("utf-8", errors="surrogateescape") for piece in pieces]
        marked = any(map(_is_continuation, texts)) and not any(map(_begins_space, texts))
        flags = np.array([*(_flags(text, marked) for text in texts), 0], np.uint8)
        return cls(flags, np.flatnonzero(flags & _ORDINARY).astype(np.int32))

    def are_ordinary(self, tokens: np.ndarray) -> np.ndarray:
        """[B, L] int32 to [B, L] bool: False for special tokens and padding."""
        return self.flags.take(tokens) & _ORDINARY != 0

    def continue_words(self, tokens: np.ndarray) -> np.ndarray:
        """[B, L] int32 to [B, L] bool: True where a piece is of the same word as the one before."""
        flags = self.flags.take(tokens)
        return _one_later(flags & _JOINS_RIGHT) & (flags & _JOINS_LEFT != 0)

    def start_sentences(self, tokens: np.ndarray) -> np.ndarray:
        """[B, L] int32 to [B, L] bool: True where a sentence or line follows another one."""
        flags = self.flags.take(tokens)
        starts = _one_later(flags & _STOP) & (flags & _SPACE != 0)
        starts |= _one_later(flags & _ENDS_LINE)
        starts[:, 1:] |= flags[:, 1:] & _BEGINS_LINE != 0
        return starts


def _one_later(flags: np.ndarray) -> np.ndarray:
    """True where the column before has any flag."""
    later = np.zeros(flags.shape, bool)
    np.not_equal(flags[:, :-1], 0, out=later[:, 1:])
    return later


def _flags(text: str, marked: bool) -> int:
    """Of one piece; `marked` is whether the vocabulary marks what continues a word."""
    if not text:
        return 0
    if marked:
        joins_left, joins_right = _is_continuation(text), True
    else:
        joins_left, joins_right = _is_letter(text[0]), _is_letter(text[-1])
        joins_left &= not "\udce0" <= text[0] <= "\udcff"  # the first of three or four bytes
    flags = _ORDINARY | joins_left * _JOINS_LEFT | joins_right * _JOINS_RIGHT
    begins_line = text[0] in "\r\n" and bool(text.strip("\r\n"))
    ends_line = text.rstrip(" \t").endswith("\n") and not begins_line
    flags |= begins_line * _BEGINS_LINE
    flags |= (ends_line or text.endswith(_FULL_STOPS)) * _ENDS_LINE
    flags |= text.rstrip("\"')]").endswith(_STOPS) * _STOP
    return flags | (not joins_left if marked else _begins_space(text)) * _SPACE


def _begins_space(text: str) -> bool:
    return text[:1].isspace() or text.startswith(_META_SPACE)


def _is_continuation(text: str) -> bool:
    return text.startswith(_CONTINUATION) and len(text) > 2 and text[2] != "#"


def _is_letter(character: str) -> bool:
    """Also a lone byte of a longer character, and an accent; not an ideograph."""
    if any(first <= character <= last for first, last in _IDEOGRAPHS):
        return False
    is_byte = "\udc80" <= character <= "\udcff"
    return is_byte or character.isalnum() or unicodedata.category(character)[0] == "M"
