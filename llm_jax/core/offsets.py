"""Which characters of a text each of its tokens stands for.

Where the tokens' bytes are the text's, their lengths say it exactly. Tokenizers that lose case, accents or
spaces (WordPiece) are followed through the text: what is left of a text and of each piece without these is
compared, piece after piece; unknown tokens reach to where the next known one is found.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

from llm_jax.core.types import Tokenizer

_LOOK_AHEAD = 32  # characters that a tokenizer may have dropped between two pieces
_META_SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class Offsets:
    """Tables of one tokenizer: the bytes of each piece, and its bare text; b"" and None if special."""

    pieces: tuple[bytes, ...]
    bare: tuple[str | None, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Offsets":
        pieces = tuple(tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))
        return cls(pieces, tuple(map(_bare_piece, pieces)))

    def __call__(self, text: str, ids: Sequence[int]) -> np.ndarray:
        """[N, 2] int64: first character of each of N tokens, and the one after its last."""
        pieces, encoded = [self.pieces[i] for i in ids], text.encode("utf-8")
        joined = b"".join(pieces)
        prefix = len(joined) - len(encoded)
        if prefix in (0, 1) and joined == b" " * prefix + encoded:  # 1: a dummy prefix (Llama 2)
            return _exact(encoded, np.array([len(piece) for piece in pieces], np.int64), prefix)
        return _followed(text, [self.bare[i] for i in ids])


def _exact(encoded: bytes, sizes: np.ndarray, prefix: int) -> np.ndarray:
    """A token of a lone byte stands for the character that the byte belongs to."""
    ends = np.cumsum(sizes) - prefix
    starts = np.maximum(ends - sizes, 0)
    opens = (np.frombuffer(encoded, np.uint8) & 0xC0) != 0x80
    character = np.concatenate(
        [np.cumsum(opens) - 1, [opens.sum()]]
    )  # of each byte, and of the end
    last = character[np.maximum(ends - 1, 0)] + 1
    return np.stack([character[starts], np.where(ends > starts, last, character[starts])], axis=1)


def _followed(text: str, pieces: list[str | None]) -> np.ndarray:
    bare, places = _bare(text)
    places.append(len(text))
    spans, at, lost = [], 0, False
    for piece in pieces:
        if piece is None:  # unknown
            spans.append((at, None))
            lost = True
            continue
        found = bare.find(piece, at, len(bare) if lost else at + len(piece) + _LOOK_AHEAD)
        if not piece or found < 0:  # a space, or written in a way that is not foreseen here
            spans.append((at, at))
            continue
        at, lost = found + len(piece), False
        spans.append((found, at))
    characters, next_start = [], len(bare)
    for start, end in reversed(spans):
        is_known = end is not None
        end = end if is_known else next_start
        # The span's last character, and one more: what follows may be a space.
        characters.append((places[start], places[end - 1] + 1 if end > start else places[start]))
        next_start = start if is_known else next_start
    return np.array(characters[::-1], np.int64).reshape(-1, 2)


def _bare(text: str) -> tuple[str, list[int]]:
    """The text without case, accents and spaces, and which character each of its characters was."""
    if text.isascii():
        kept = [(c, i) for i, c in enumerate(text.lower()) if not c.isspace()]
    else:
        kept = [(c, i) for i, character in enumerate(text) for c in _plain(character)]
    return "".join(c for c, _ in kept), [i for _, i in kept]


@functools.cache
def _plain(character: str) -> str:
    """Without case, accents and spaces; but of an accent that stands alone all."""
    kept = [
        c
        for c in unicodedata.normalize("NFKD", character.lower())
        if not c.isspace() and unicodedata.category(c) != "Mn"
    ]
    alone = not (character.isspace() or unicodedata.category(character) == "Mn")
    return "".join(kept) or (character if alone else "")


def _bare_piece(piece: bytes) -> str | None:
    if not piece:
        return None
    text = piece.decode("utf-8", errors="replace").replace(_META_SPACE, "")
    return _bare(text[2:] if text.startswith("##") and len(text) > 2 else text)[0]
