"""The half that all tokenizers share: ids to bytes, files on disk, and the surrogate check.

`PieceTokenizer` holds the bytes of every id, so decoding is a join and never the library's business:
SentencePiece's own decoder would turn U+2581 into a space and drop a space at the start.
"""

import abc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llm_jax.core.config import ConfigError, component

META_FILE = "tokenizer_meta.json"
META_SPACE = "▁"  # U+2581, how SentencePiece writes a space inside a piece


class PieceTokenizer(abc.ABC):
    """A `core.types.Tokenizer` over a table of bytes.

    Args:
      piece_bytes: the bytes of id 0, 1, ...; ignored for special ids, which decode to nothing.
      special_tokens: id -> how it is written, e.g. {1: "<s>"}.
      prefix: what `encode` put before the text and `decode` has to take away (b" " or b"").
    """

    name: ClassVar[str]
    model_file: ClassVar[str | None] = None
    _num_threads: int | None = None

    def __init__(
        self,
        piece_bytes: Sequence[bytes],
        special_tokens: Mapping[int, str],
        *,
        bos_id: int,
        eos_id: int,
        pad_id: int,
        prefix: bytes = b"",
    ):
        self.vocab_size = len(piece_bytes)
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.special_tokens = dict(special_tokens)
        self._ids_by_text = {text: i for i, text in self.special_tokens.items()}
        self._piece_bytes = [
            b"" if i in self.special_tokens else piece for i, piece in enumerate(piece_bytes)
        ]
        self._prefix = prefix

    def __reduce__(self):
        # Worker processes get a copy this way; the libraries' own pickles drop some of the settings.
        return _rebuild, (self.name, self.model_bytes(), self.settings(), self._num_threads)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Raises ValueError for lone surrogates."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def save_huggingface(self, directory: Path) -> None:
        """Writes what `transformers.AutoTokenizer.from_pretrained(directory)` reads."""

    def model_bytes(self) -> bytes:
        """The content of `model_file`: with `settings`, all that decides an id."""
        return b""

    def settings(self) -> dict[str, Any]:
        """What `from_model` needs beside the model; JSON."""
        return {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).removeprefix(self._prefix).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of these ids, so that a stream can hold back half a character.

        A model with a dummy prefix (Llama 2) yields the space at the start, which `decode` removes.
        """
        ids = list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"token id {wrong} is outside 0..{self.vocab_size - 1}")
        return b"".join(map(self._piece_bytes.__getitem__, ids))

    def token_id(self, piece: str) -> int | None:
        return self._ids_by_text.get(piece)

    def id_to_piece(self, token_id: int) -> str:
        if token_id in self.special_tokens:
            return self.special_tokens[token_id]
        return show_bytes(self.decode_bytes([token_id]))

    def save(self, directory: Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.model_file is not None:
            (directory / self.model_file).write_bytes(self.model_bytes())
        text = json.dumps(self._meta(), indent=2, ensure_ascii=False)
        (directory / META_FILE).write_text(text + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._meta(), sort_keys=True).encode()).hexdigest()

    def _meta(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "model_file": self.model_file,
            "model_sha256": hashlib.sha256(self.model_bytes()).hexdigest(),
            "settings": self.settings(),
        }


class MetaSpaceTokenizer(PieceTokenizer):
    """A tokenizer whose library writes a space as U+2581 and so cannot tell the two apart.

    Texts are cut at a literal U+2581, which becomes `_mark_ids` (its three byte pieces). So that only
    the start of a text gets a dummy prefix, the prefix is `_space`, put there by this class.
    """

    _mark_ids: list[int] | None = None
    _space: str = ""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def encode(self, text: str) -> list[int]:
        if self._space and text:
            text = self._space + text
        if self._mark_ids is not None and META_SPACE in text:
            return self._encode_around_mark(text)
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(texts)
        if self._space:
            texts = [self._space + text if text else text for text in texts]
        batch = self._encode_batch(texts)
        if self._mark_ids is not None:
            for i, text in enumerate(texts):
                if META_SPACE in text:
                    batch[i] = self._encode_around_mark(text)
        return batch

    def _encode_around_mark(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(META_SPACE)):
            if i:
                ids += self._mark_ids
            if part:
                ids += self._encode(part)
        return ids


def check_extra_tokens(extra_tokens: Sequence[str], taken: Iterable[str]) -> None:
    """Raises ConfigError where a text cannot become a special token of its own.

    Args:
      taken: what the tokenizer's other special tokens and pieces are called.
    """
    seen = set(taken)
    for token in extra_tokens:
        if not token or not token.isprintable() or " " in token or META_SPACE in token:
            raise ConfigError(
                f"extra_tokens: {token!r}: expected printable characters without a space"
            )
        if token in seen:
            raise ConfigError(f"extra_tokens: {token!r} is in the vocabulary already")
        seen.add(token)


def show_bytes(piece: bytes) -> str:
    r"""A piece for a person: `\n` for a newline, `<0xE4>` for a byte that is no UTF-8."""
    shown = []
    for character in piece.decode("utf-8", errors="surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            shown.append(f"<0x{ord(character) - 0xDC00:02X}>")
        elif character.isprintable() and character != "\\":
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode("ascii"))
    return "".join(shown)


def reject_surrogates(texts: Iterable[str]) -> None:
    """Raises ValueError for a text that has no UTF-8 form."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"lone surrogate {text[error.start]!r} at character {error.start}: "
                "decode the document with errors='replace' in its source"
            ) from None


def _rebuild(
    name: str, model: bytes, settings: dict[str, Any], num_threads: int | None
) -> PieceTokenizer:
    return component("data.tokenizers", name).from_model(model, settings, num_threads)
