"""Tokenizers as llama.cpp has them: `llama`, pieces with scores (SentencePiece), and `gpt2`, byte-level BPE.

A `gpt2` vocabulary names one of llama.cpp's word patterns, "tokenizer.ggml.pre"; which one is seen from the
tokenizer's own pattern, and another pattern is refused. What llama.cpp has no place for: a literal U+2581
in a SentencePiece text, which it takes for a space, unigram models, which lack a byte fallback there, and
user-defined pieces with a space before texts, which it puts behind such a piece, too. Texts begin with bos, as in training.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Tokenizer
from llm_jax.data.tokenizers.pieces import META_SPACE
from llm_jax.data.tokenizers.sentencepiece_proto import PieceType, read_model
from llm_jax.data.tokenizers.tiktoken import ENCODINGS
from llm_jax.export.vocabulary import check_bpe, check_plain, with_byte_fallback

_BPE = 2  # of SentencePiece
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# By pattern of a Split, and whether whole words in the vocabulary are taken without merging.
_PATTERNS = {
    (ENCODINGS["r50k_base"].huggingface_pattern, False): "gpt-2",
    (ENCODINGS["r50k_base"].huggingface_pattern, True): "gpt-2",
    (ENCODINGS["cl100k_base"].huggingface_pattern, True): "llama-bpe",
    (ENCODINGS["cl100k_base"].huggingface_pattern, False): "dbrx",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_QWEN2, False): "qwen2",
    (ENCODINGS["o200k_base"].huggingface_pattern, False): "gpt-4o",
    (ENCODINGS["o200k_base"].huggingface_pattern, True): "gpt-4o",
}
# llama.cpp wants merges, and gguf no empty list: these two never stand side by side.
_NO_MERGES = ["<s> </s>"]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """model: "llama" or "gpt2"; types: of SentencePiece; scores are of "llama", pre and merges of "gpt2"."""

    model: str
    tokens: list[str]
    types: list[int]
    space_prefix: bool = False
    scores: list[float] | None = None
    pre: str = "default"
    merges: list[str] | None = None

    def padded(self, size: int) -> "Vocabulary":
        """With tokens that stand for nothing, for rows of the embedding that have none."""
        missing = range(len(self.tokens), size)
        count = len(missing)
        return dataclasses.replace(
            self,
            tokens=self.tokens + [f"[PAD{i}]" for i in missing],
            types=self.types + [int(PieceType.UNUSED)] * count,
            scores=None if self.scores is None else self.scores + [-1e4] * count,
        )

    def metadata(self, tokenizer: Tokenizer) -> dict[str, Any]:
        out = {
            "model": self.model,
            "pre": self.pre,
            "tokens": self.tokens,
            "token_type": self.types,
            "scores": self.scores,
            "merges": self.merges,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "padding_token_id": tokenizer.pad_id,
            "add_bos_token": True,
            "add_eos_token": False,
            "add_space_prefix": self.space_prefix,
        }
        return {f"tokenizer.ggml.{key}": x for key, x in out.items() if x is not None}


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Raises ConfigError for a tokenizer that llama.cpp has no like of."""
    kind = getattr(tokenizer, "name", None)
    if kind == "sentencepiece":
        return _of_sentencepiece(tokenizer)
    if not hasattr(tokenizer, "save_huggingface"):
        raise ConfigError(f"{type(tokenizer).__name__} cannot be written for llama.cpp")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_huggingface(Path(folder))
        description = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    model = description["model"]
    if model.get("type") != "BPE":
        raise ConfigError(
            f"llama.cpp gets no tokenizer of type {model.get('type')!r} from here; choices: BPE"
        )
    if model.get("byte_fallback"):
        return _of_fallback(description, tokenizer.vocab_size)
    return _of_byte_level(description, tokenizer.vocab_size)


def _of_sentencepiece(tokenizer: Tokenizer) -> Vocabulary:
    parsed = read_model(tokenizer.model_bytes())
    reason = parsed.loss
    if parsed.model_type != _BPE:
        reason = "it is no bpe, and llama.cpp has no byte fallback for others"
    types = [int(piece.type) for piece in parsed.pieces]
    tokens = [piece.text for piece in parsed.pieces]
    for i, kind in enumerate(types):
        if kind == PieceType.USER_DEFINED:
            if " " in tokens[i]:
                reason = f"its user-defined piece {tokens[i]!r} is found in no text"
            tokens[i] = tokens[i].replace(META_SPACE, " ")
    if reason is not None:
        raise ConfigError(f"llama.cpp cannot have this SentencePiece model: {reason}")
    _check_prefix(parsed.add_dummy_prefix, types)
    return Vocabulary(
        "llama",
        tokens,
        types,
        parsed.add_dummy_prefix,
        scores=[piece.score for piece in parsed.pieces],
    )


def _of_byte_level(description: Mapping[str, Any], size: int) -> Vocabulary:
    tokens, types = _tokens(description, size)
    merges = [" ".join(_pair(merge)) for merge in description["model"]["merges"]]
    pre = _pattern(description, has_merges=bool(merges))
    return Vocabulary("gpt2", tokens, types, pre=pre, merges=merges or _NO_MERGES)


def _of_fallback(description: Mapping[str, Any], size: int) -> Vocabulary:
    """What was a SentencePiece model once (Llama 2, Gemma): the earlier a merge, the higher its score."""
    check_bpe(description)
    added = description.get("added_tokens") or ()
    check_plain([token for token in added if not token["special"]], description)
    prefix = with_byte_fallback(description)["space_before"]
    tokens, types = _tokens(description, size)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(description["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = int(PieceType.BYTE)
    unknown = description["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = int(PieceType.UNKNOWN)
    _check_prefix(prefix, types)
    spaced = [
        token if kind == PieceType.USER_DEFINED else token.replace(" ", META_SPACE)
        for token, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary("llama", spaced, types, prefix, scores=scores)


def _check_prefix(prefix: bool, types: Sequence[int]) -> None:
    """llama.cpp looks for user-defined pieces in the raw text and takes what follows one for a text."""
    if prefix and PieceType.USER_DEFINED in types:
        raise ConfigError(
            "llama.cpp cannot have this tokenizer: it has user-defined pieces and puts a space before texts"
        )


def _tokens(description: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(PieceType.UNUSED)] * size
    for text, i in description["model"]["vocab"].items():
        tokens[i], types[i] = text, int(PieceType.NORMAL)
    for added in description.get("added_tokens") or ():
        kind = PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _steps(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if section is None:
        return []
    inner = section.get("normalizers") or section.get("pretokenizers")
    return list(inner) if section["type"] == "Sequence" else [section]


def _pattern(description: Mapping[str, Any], *, has_merges: bool) -> str:
    """llama.cpp's name of the pattern that cuts texts into words."""
    steps = _steps(description.get("pre_tokenizer"))
    splits = [step for step in steps if step["type"] == "Split"]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    whole = bool(description["model"].get("ignore_merges"))
    known = len(splits) + len(byte_level) == len(steps) and len(byte_level) == 1
    known &= all(step["behavior"] == "Isolated" and not step["invert"] for step in splits)
    known &= not any(step.get("add_prefix_space", True) for step in byte_level)
    name = None
    if known and steps[-1] is byte_level[0] and not _steps(description.get("normalizer")):
        cuts = byte_level[0].get("use_regex", True)
        if not has_merges and not whole:
            name = "gpt-2"  # every byte by itself, however texts are cut
        elif len(splits) == 1 and not cuts:
            name = _PATTERNS.get((splits[0]["pattern"].get("Regex"), whole))
        elif not splits and cuts:
            name = "gpt-2"
    if name is None:
        raise ConfigError(
            "llama.cpp's word patterns have none like this tokenizer's; those known here: "
            f"{', '.join(dict.fromkeys(_PATTERNS.values()))}"
        )
    return name
