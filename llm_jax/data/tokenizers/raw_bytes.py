"""Bytes as tokens: ids 0..255 are the bytes, then bos, eos, pad. Nothing to train, nothing to lose."""

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
from llm_jax.data.tokenizers.pieces import PieceTokenizer, reject_surrogates

BOS, EOS, PAD = 256, 257, 258


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "raw_bytes"
    vocab_size: int = 259

    def __post_init__(self):
        if self.vocab_size != 259:
            raise ConfigError(
                f"vocab_size = {self.vocab_size}: raw_bytes has 259 (256, bos, eos, pad)"
            )


class RawBytesTokenizer(PieceTokenizer):
    name = "raw_bytes"

    def __init__(self):
        super().__init__(
            [*(bytes([b]) for b in range(256)), b"", b"", b""],
            {BOS: "<s>", EOS: "</s>", PAD: "<pad>"},
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
    return RawBytesTokenizer()


def from_model(
    model: bytes, settings: dict[str, Any], num_threads: int | None
) -> RawBytesTokenizer:
    return RawBytesTokenizer()
