"""OpenAI's byte-level BPE from a local `.tiktoken` ranks file. Needs `pip install "llm_jax[tiktoken]"`.

Nothing is fetched: `encoding` is a ranks file, or the name of a known encoding whose file lies in
$TIKTOKEN_CACHE_DIR, as NAME.tiktoken or where tiktoken itself caches it. The special token
`<|endoftext|>` is bos, eos and padding at once, as these encodings have no other.
"""

import base64
import binascii
import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError, nearest
from llm_jax.data.tokenizers.huggingface_files import (
    BYTE_LEVEL_DECODER,
    bpe_model,
    byte_level_alphabet,
    merges_in_order,
    write_huggingface,
)
from llm_jax.data.tokenizers.pieces import PieceTokenizer, reject_surrogates

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """pattern: splits text into words; source: tiktoken_ext/openai_public.py of tiktoken 0.14.

    huggingface_pattern: the same without possessive quantifiers, which its regex engine lacks.
    """

    pattern: str
    huggingface_pattern: str
    end_of_text: int


_GPT2 = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENCODINGS = {
    "r50k_base": Encoding(*_GPT2, end_of_text=50256),
    "p50k_base": Encoding(*_GPT2, end_of_text=50256),
    "cl100k_base": Encoding(*_CL100K, end_of_text=100257),
    "o200k_base": Encoding(_O200K, _O200K, end_of_text=199999),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """encoding: a known name, or the path of a ranks file.

    pattern_of: the known encoding whose word pattern an own ranks file goes with; None looks at the
      file's name, and takes cl100k_base if that tells nothing.
    """

    name: str = "tiktoken"
    encoding: str = "cl100k_base"
    pattern_of: str | None = None
    num_threads: int | None = None

    def __post_init__(self):
        if self.pattern_of is not None and self.pattern_of not in ENCODINGS:
            raise ConfigError(
                f"pattern_of = {self.pattern_of!r}{nearest(self.pattern_of, ENCODINGS)}; "
                f"choices: {', '.join(ENCODINGS)}"
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads = {self.num_threads}: must be positive or None")


class TiktokenTokenizer(PieceTokenizer):
    """Args: model: the ranks file; pattern_of: a key of ENCODINGS; end_of_text: its id."""

    name = "tiktoken"
    model_file = "tokenizer.tiktoken"

    def __init__(
        self, model: bytes, pattern_of: str, end_of_text: int, num_threads: int | None = None
    ):
        _require_tiktoken()
        import tiktoken

        self._model = model
        self._ranks = _read_ranks(model)
        self._settings = {"pattern_of": pattern_of, "end_of_text": end_of_text}
        self._num_threads = num_threads
        self._library = tiktoken.Encoding(
            name=pattern_of,
            pat_str=ENCODINGS[pattern_of].pattern,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: end_of_text},
        )
        piece_bytes = [b""] * self._library.n_vocab
        for piece, rank in self._ranks.items():
            piece_bytes[rank] = piece
        super().__init__(
            piece_bytes,
            {end_of_text: END_OF_TEXT},
            bos_id=end_of_text,
            eos_id=end_of_text,
            pad_id=end_of_text,
        )

    def encode(self, text: str) -> list[int]:
        reject_surrogates([text])  # tiktoken would replace them in silence
        return self._library.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(texts)
        reject_surrogates(texts)
        num_threads = self._num_threads or os.cpu_count() or 1
        return self._library.encode_ordinary_batch(texts, num_threads=num_threads)

    def model_bytes(self) -> bytes:
        return self._model

    def settings(self) -> dict[str, Any]:
        return self._settings

    def save_huggingface(self, directory: Path) -> None:
        alphabet = byte_level_alphabet()
        shown = {
            rank: "".join(alphabet[byte] for byte in piece) for piece, rank in self._ranks.items()
        }
        vocab = {text: rank for rank, text in shown.items()}
        vocab |= {text: token_id for token_id, text in self.special_tokens.items()}
        split = {
            "type": "Split",
            "pattern": {"Regex": ENCODINGS[self._settings["pattern_of"]].huggingface_pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        write_huggingface(
            directory,
            model=bpe_model(
                vocab, merges_in_order(shown[rank] for rank in sorted(shown)), ignore_merges=True
            ),
            pre_tokenizer={"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL_DECODER]},
            decoder=BYTE_LEVEL_DECODER,
            special_tokens=self.special_tokens,
            roles=dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        )


def make(config: Config) -> TiktokenTokenizer:
    """Reads the ranks file; raises ConfigError where there is none."""
    _require_tiktoken()
    path = _find_ranks(config.encoding)
    model = path.read_bytes()
    known = path.stem if path.stem in ENCODINGS else None
    if config.encoding in ENCODINGS:
        known = config.encoding
    pattern_of = config.pattern_of or known or "cl100k_base"
    try:
        ranks = _read_ranks(model)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    end_of_text = max(ranks.values()) + 1
    if known is not None:
        end_of_text = max(end_of_text, ENCODINGS[known].end_of_text)
    return TiktokenTokenizer(model, pattern_of, end_of_text, config.num_threads)


def from_model(
    model: bytes, settings: Mapping[str, Any], num_threads: int | None
) -> TiktokenTokenizer:
    return TiktokenTokenizer(model, settings["pattern_of"], settings["end_of_text"], num_threads)


def _find_ranks(encoding: str) -> Path:
    if encoding not in ENCODINGS:
        if Path(encoding).is_file():
            return Path(encoding)
        raise ConfigError(
            f"encoding = {encoding!r}: no such ranks file{nearest(encoding, ENCODINGS)}; "
            f"choices: a path or {', '.join(ENCODINGS)}"
        )
    url = f"https://openaipublic.blob.core.windows.net/encodings/{encoding}.tiktoken"
    cached = hashlib.sha1(url.encode()).hexdigest()  # the file name tiktoken itself gives it
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    for name in (f"{encoding}.tiktoken", cached):
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ConfigError(
        f"encoding = {encoding!r}: no {encoding}.tiktoken in $TIKTOKEN_CACHE_DIR "
        f"({folder or 'not set'}); download {url} and give its path"
    )


def _read_ranks(model: bytes) -> dict[bytes, int]:
    """Lines of `base64(piece) rank`. Raises ValueError if they are none or a byte has no rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(model.splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not 'base64 rank'") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"not a ranks file: byte 0x{missing[0]:02X} has no rank")
    return ranks


def _require_tiktoken() -> None:
    if importlib.util.find_spec("tiktoken") is None:
        raise ConfigError('tokenizer tiktoken needs: pip install "llm_jax[tiktoken]"')
