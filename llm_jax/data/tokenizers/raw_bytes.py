"""Bytes as tokens: 0..255 are the bytes, then bos, eos, pad, extras. Nothing to train or to lose."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.huggingface_files import (
    BYTE_LEVEL_DECODER,
    bpe_model,
    byte_level_alphabet,
    write_huggingface,
)
from llm_jax.data.tokenizers.pieces import (
    PieceTokenizer,
    check_extra_tokens,
    reject_surrogates,
)

BOS, EOS, PAD = 256, 257, 258
_SPECIAL = {BOS: "<s>", EOS: "</s>", PAD: "<pad>"}


@dataclasses.dataclass(frozen=True)
class Config:
    """extra_tokens: special tokens with the ids from 259 on. vocab_size: follows from them."""

    name: str = "raw_bytes"
    vocab_size: int | None = None
    extra_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        check_extra_tokens(self.extra_tokens, _SPECIAL.values())
        size = 256 + len(_SPECIAL) + len(self.extra_tokens)
        if self.vocab_size not in (None, size):
            extra = f" and {len(self.extra_tokens)} extra tokens" if self.extra_tokens else ""
            raise ConfigError(
                f"vocab_size = {self.vocab_size}: raw_bytes has {size} (256, bos, eos, pad{extra})"
            )
        object.__setattr__(self, "vocab_size", size)


class RawBytesTokenizer(PieceTokenizer):
    name = "raw_bytes"

    def __init__(self, extra_tokens: Sequence[str] = ()):
        self._extra_tokens = list(extra_tokens)
        special = {**_SPECIAL, **dict(enumerate(extra_tokens, 256 + len(_SPECIAL)))}
        super().__init__(
            [*(bytes([b]) for b in range(256)), *([b""] * len(special))],
            special,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
        )

    def encode(self, text: str) -> list[int]:
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError:
            reject_surrogates([text])
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def settings(self) -> dict[str, Any]:
        return {"extra_tokens": self._extra_tokens} if self._extra_tokens else {}

    def save_huggingface(self, directory: Path) -> None:
        vocab = {character: byte for byte, character in enumerate(byte_level_alphabet())}
        vocab |= {text: token_id for token_id, text in self.special_tokens.items()}
        write_huggingface(
            directory,
            model=bpe_model(vocab, []),
            pre_tokenizer=BYTE_LEVEL_DECODER,
            decoder=BYTE_LEVEL_DECODER,
            special_tokens=self.special_tokens,
            roles={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        )


def make(config: Config) -> RawBytesTokenizer:
    return RawBytesTokenizer(config.extra_tokens)


def from_model(
    model: bytes, settings: dict[str, Any], num_threads: int | None
) -> RawBytesTokenizer:
    return RawBytesTokenizer(**settings)
