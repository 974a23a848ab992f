r"""Our tokenizers for programs without their libraries: what standalone/tokenizer.py needs of one.

    raw_bytes       all
    sentencepiece   bpe and unigram that give back every text
    tiktoken        all
    huggingface     BPE: byte-level (GPT-2, Llama 3, Qwen) or with byte fallback (Llama 2)

Others are refused in one line. Patterns that cut words are rewritten for Python's `re`, which has no
\p{..}: those stand in classes, where the program fills in ranges from its unicodedata. So a character
that is newer than the Unicode of that Python (3.9: 13.0, 3.13: 15.1) may be cut otherwise.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.huggingface_files import byte_level_alphabet
from llm_jax.data.tokenizers.pieces import META_SPACE, PieceTokenizer
from llm_jax.data.tokenizers.sentencepiece_proto import PieceType, read_model
from llm_jax.data.tokenizers.tiktoken import ENCODINGS

# What a template may ask about a tokenizer, where there is none.
NO_TOKENIZER = dict.fromkeys(
    ("raw_bytes", "byte_level", "bpe", "by_rank", "by_pair", "unigram", "user_defined", "whole_words",
     "space_before", "normalize"),
    False,
)  # fmt: skip
_UNIGRAM, _BPE = 1, 2
_UNKNOWN_PENALTY = 10.0  # kUnkPenalty of SentencePiece
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What may stand in a pattern, and what stays as it is in Python's `re`.
_TOKENS = re.compile(
    r"(?P<category>\\p\{(?:L|Ll|Lu|Lt|Lm|Lo|M|Mn|Mc|Me|N|Nd|Nl|No|P|S|Z|Zs)\})"
    r"|(?P<space>\\s)|(?P<no_space>\\S)|(?P<end>\$)|(?P<open>\[\^?)|(?P<close>\])"
    r"|(?P<quantifier>[+*?]|\{\d+(?:,\d*)?\})(?P<possessive>\+?)"
    r"|(?P<same>\(\?(?:i:|:|=|!)|\((?!\?)|[)|]|\\[rnt]|[\w '\-/!-#%&,:-@_`~])"
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """given: what the template asks for; tensors: by name, to be stored beside the parameters."""

    given: dict[str, Any]
    tensors: dict[str, np.ndarray]


def vocabulary(tokenizer: PieceTokenizer) -> Vocabulary:
    """What the template needs of this tokenizer.

    Raises:
      ConfigError: a tokenizer that plain Python cannot follow; says why.
    """
    makers: dict[str, Callable[[PieceTokenizer], Vocabulary]] = {
        "raw_bytes": lambda tokenizer: _made(tokenizer, {"raw_bytes": True}, {}),
        "sentencepiece": _sentencepiece,
        "tiktoken": _tiktoken,
        "huggingface": _huggingface,
    }
    name = getattr(tokenizer, "name", type(tokenizer).__name__)
    if name not in makers:
        raise _refused(f"tokenizer {name!r}")
    return makers[name](tokenizer)


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"{what} cannot be written for other programs; choices: raw_bytes, tiktoken, sentencepiece that gives back "
        "every text, a tokenizer.json with byte-level BPE or BPE with byte fallback"
    )


def _made(
    tokenizer: PieceTokenizer, given: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Vocabulary:
    given = {**NO_TOKENIZER, **given}
    given["num_tokens"] = tokenizer.vocab_size
    given["bpe"] = given["by_rank"] or given["by_pair"]
    given["encode"] = "encode_part" if given["user_defined"] else "encode"
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    if not given["raw_bytes"]:
        pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        tensors["bytes"] = np.frombuffer(b"".join(pieces), np.uint8)
        tensors["lengths"] = np.array([len(piece) for piece in pieces], np.int32)
    return Vocabulary(given, {f"tokenizer.{name}": x for name, x in tensors.items()})


def _sentencepiece(tokenizer: PieceTokenizer) -> Vocabulary:
    model = read_model(tokenizer.model_bytes())
    types = [piece.type for piece in model.pieces]
    reason = model.loss
    if model.model_type not in (_UNIGRAM, _BPE):
        reason = "it is neither unigram nor bpe"
    if PieceType.UNUSED in types:
        reason = "it has unused pieces"
    if model.whitespace_as_suffix:
        reason = "it puts spaces behind words"
    if PieceType.USER_DEFINED in types and model.model_type == _UNIGRAM:
        reason = "it is unigram and has user-defined pieces"  # equal sums there are told apart by rounding
    if reason is not None:
        raise _refused(f"this SentencePiece model: {reason}, which")
    scores = np.array([piece.score for piece in model.pieces], np.float32)
    # Spaces of a text have become U+2581 where pieces are looked for, so a piece with one is not found.
    findable = np.array([" " not in piece.text for piece in model.pieces])
    normal = findable & np.array([kind == PieceType.NORMAL for kind in types])
    user = findable & np.array([kind == PieceType.USER_DEFINED for kind in types])
    by_text = {piece.text: i for i, piece in enumerate(model.pieces)}
    byte_ids = np.array([by_text[f"<0x{byte:02X}>"] for byte in range(256)], np.int32)
    given: dict[str, Any] = {"space_before": model.add_dummy_prefix}
    tensors = {"byte_ids": byte_ids}
    if model.model_type == _BPE:
        # The greatest score first; equal ones from the left.
        ranks = np.unique(-scores, return_inverse=True)[1]
        tensors["ranks"] = np.where(normal, ranks, -1).astype(np.int32)
        tensors |= {"user_defined": np.flatnonzero(user).astype(np.int32)} if user.any() else {}
        return _made(tokenizer, given | {"by_rank": True, "user_defined": user.any()}, tensors)
    tensors |= {"scores": scores, "known": np.flatnonzero(normal).astype(np.int32)}
    unknown = np.float32(scores[normal].min()) - np.float32(_UNKNOWN_PENALTY)
    return _made(tokenizer, given | {"unigram": True, "unknown_score": float(unknown)}, tensors)


def _tiktoken(tokenizer: PieceTokenizer) -> Vocabulary:
    pattern = ENCODINGS[tokenizer.settings()["pattern_of"]].pattern
    given = {
        "byte_level": True, "by_rank": True, "whole_words": True, "pattern": _literal(_for_re(pattern)),
    }  # fmt: skip
    ids = range(tokenizer.vocab_size)
    ranks = [i if tokenizer.decode_bytes([i]) else -1 for i in ids]
    return _made(tokenizer, given, {"ranks": np.array(ranks, np.int32)})


def _huggingface(tokenizer: PieceTokenizer) -> Vocabulary:
    content = json.loads(tokenizer.model_bytes())
    model = content["model"]
    check_bpe(content)
    vocab: dict[str, int] = model["vocab"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"] or ()]
    rows = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
    special = set(tokenizer.special_tokens)
    plain = [t for t in content["added_tokens"] if not t["special"] and t["id"] not in special]
    tensors: dict[str, Any] = {
        "merges": np.array(rows, np.int32).reshape(-1, 3),
        "known": np.array([i for i in sorted(vocab.values()) if i not in special], np.int32),
    }
    given: dict[str, Any] = {
        "by_pair": True, "whole_words": bool(model.get("ignore_merges")), "user_defined": bool(plain),
    }  # fmt: skip
    if plain:
        check_plain(plain, content)
        tensors["user_defined"] = np.array([token["id"] for token in plain], np.int32)
    if _steps(content, "decoder", "decoders")[0]["type"] == "ByteLevel":
        given |= _byte_level(content)
        names = byte_level_alphabet()
    else:
        given |= with_byte_fallback(content)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        known = [i for text, i in vocab.items() if i not in special and text not in set(names)]
        tensors["known"] = np.array(sorted(known), np.int32)
    missing = [name for name in names if name not in vocab]
    if missing:
        raise _refused(
            f"this tokenizer.json: it lacks a token for each byte ({missing[0]!r}), which"
        )
    tensors["byte_ids"] = np.array([vocab[name] for name in names], np.int32)
    return _made(tokenizer, given, tensors)


def _steps(content: Mapping[str, Any], part: str, inner: str) -> list[Mapping[str, Any]]:
    step = content.get(part)
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def check_bpe(content: Mapping[str, Any]) -> None:
    """Raises ConfigError for a tokenizer.json that is no BPE, or one with options of its own."""
    model = content["model"]
    kind = model.get("type", "BPE" if "merges" in model else "without a type")
    if kind != "BPE":
        raise _refused(f"a tokenizer.json with a model {kind}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refused(f"a tokenizer.json with {option} = {model[option]!r}")
    if not _steps(content, "decoder", "decoders"):
        raise _refused("a tokenizer.json without a decoder")


def check_plain(plain: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    """Raises ConfigError unless these added tokens are found in a text as it stands."""
    for token in plain:
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise _refused(f"a tokenizer.json whose token {token['content']!r} has {option}")
        if token.get("normalized") and content.get("normalizer"):
            raise _refused(f"a tokenizer.json whose token {token['content']!r} is normalized")


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    normalizers = [step["type"] for step in _steps(content, "normalizer", "normalizers")]
    if normalizers not in ([], ["NFC"], ["NFD"], ["NFKC"], ["NFKD"]):
        raise _refused(f"a tokenizer.json with the normalizer {', '.join(normalizers)}")
    steps = _steps(content, "pre_tokenizer", "pretokenizers")
    level = [step for step in steps if step["type"] == "ByteLevel"]
    splits = [step for step in steps if step["type"] != "ByteLevel"]
    if len(level) != 1 or steps[-1] is not level[0] or level[0].get("add_prefix_space", True):
        raise _refused("a tokenizer.json that does not end its words with ByteLevel as it stands")
    patterns = [_split_pattern(step) for step in splits]
    if level[0].get("use_regex", True):
        patterns.append(_GPT2_PATTERN)
    if len(patterns) != 1:
        raise _refused(f"a tokenizer.json that cuts words in {len(patterns)} ways")
    if re.search(r"\$|\d\}\+", patterns[0]):  # mean another thing there
        raise _refused(f"a tokenizer.json whose words are cut by {patterns[0]!r}")
    return {
        "byte_level": True,
        "pattern": _literal(_for_re(patterns[0])),
        "normalize": normalizers[0] if normalizers else False,
    }


def _split_pattern(step: Mapping[str, Any]) -> str:
    regular = step.get("pattern", {}).get("Regex")
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"] or not regular:
        raise _refused(f"a tokenizer.json that cuts words by {step['type']}")
    return regular


def with_byte_fallback(content: Mapping[str, Any]) -> dict[str, Any]:
    """Spaces become U+2581, with one before the text or not, and nothing else is done to it.

    Raises:
      ConfigError: something else is.
    """
    if content["model"].get("ignore_merges"):
        raise _refused("a tokenizer.json with byte fallback and ignore_merges")
    space_before = swapped = False
    for step in _steps(content, "normalizer", "normalizers"):
        swaps = step["type"] == "Replace" and step["pattern"].get("String") == " "
        if step["type"] == "Prepend" and step["prepend"] in (" ", META_SPACE):
            space_before = True
        elif not (swaps and step["content"] == META_SPACE):
            raise _refused(f"a tokenizer.json with the normalizer {step['type']}")
        swapped |= swaps
    for step in _steps(content, "pre_tokenizer", "pretokenizers"):
        at_spaces = step["type"] == "Split" and step["pattern"].get("String") == " "
        if at_spaces and swapped and not step["invert"]:
            continue  # as Gemma has it: no space is left
        if step["type"] != "Metaspace" or step.get("split", True):
            raise _refused(f"a tokenizer.json that cuts words by {step['type']}")
        space_before = step["prepend_scheme"] != "never"
    kinds = {step["type"] for step in _steps(content, "decoder", "decoders")}
    if not content["model"].get("byte_fallback") or "ByteFallback" not in kinds:
        raise _refused("a tokenizer.json that has no byte fallback")
    if space_before and "Strip" not in kinds:
        raise _refused("a tokenizer.json that puts a space before a text and does not take it away")
    return {"space_before": space_before}


def _literal(pattern: str) -> str:
    """A raw string, quoted as ruff would have it."""
    quote = '"' if '"' not in pattern else "'"
    if quote in pattern:
        raise _refused(f"a tokenizer whose words are cut by {pattern!r}")
    return f"r{quote}{pattern}{quote}"


def _for_re(pattern: str) -> str:
    r"""The same for Python's `re`, with \p{..} and \s in classes only.

    Possessive quantifiers become greedy ones: in the patterns of tokenizers what such a quantifier could give back
    never begins what follows.
    """
    result, at, in_class = [], 0, False
    while at < len(pattern):
        match = _TOKENS.match(pattern, at)
        kind = match and match.lastgroup
        if match is None or (in_class and kind in ("no_space", "open", "end")):
            raise _refused(f"a tokenizer whose words are cut by {pattern!r}")
        text, at = match[0], match.end()
        if match["quantifier"] and not in_class:
            text = match["quantifier"]
        elif kind in ("category", "space") and not in_class:
            text = f"[{text}]"
        elif kind == "no_space":
            text = r"[^\s]"
        elif text == "(" and not in_class:
            text = "(?:"
        elif kind == "end":
            text = r"\Z"
        elif kind in ("open", "close"):
            in_class = kind == "open"
        result.append(text)
    return "".join(result)
