"""Writes tokenizer.json and tokenizer_config.json, without importing tokenizers or transformers.

What is unusual: spaces stand in the pieces as spaces, with no normalizer that swaps them for U+2581,
so a literal U+2581 survives; and `split_special_tokens` keeps `<s>` in plain text plain.
Format: the serde structs of huggingface/tokenizers 0.15 to 0.23.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BYTE_LEVEL_DECODER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}
_USUAL_ROLES = {
    "[CLS]": "cls_token",
    "[SEP]": "sep_token",
    "[MASK]": "mask_token",
    "<mask>": "mask_token",
}


def write_huggingface(
    directory: Path,
    *,
    model: Mapping[str, Any],
    decoder: Mapping[str, Any],
    special_tokens: Mapping[int, str],
    roles: Mapping[str, str],
    normalizer: Mapping[str, Any] | None = None,
    pre_tokenizer: Mapping[str, Any] | None = None,
    plain_tokens: Mapping[int, str] | None = None,
) -> None:
    """Writes both files into `directory`, made if absent.

    Args:
      special_tokens: id -> text of tokens that never come from plain text.
      roles: `bos_token`, `eos_token`, `pad_token`, `unk_token` -> text.
      plain_tokens: id -> text of tokens that are found in the text before anything else.
    """
    added = [_added_token(i, text, special=True) for i, text in special_tokens.items()]
    added += [_added_token(i, text, special=False) for i, text in (plain_tokens or {}).items()]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _starts_documents(special_tokens, roles.get("bos_token")),
        "decoder": decoder,
        "model": model,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "tokenizer.json", tokenizer)
    write_tokenizer_config(directory, roles, special_tokens.values())


def _starts_documents(special_tokens: Mapping[int, str], bos: str | None) -> dict | None:
    """Puts bos before a text: the models were trained on it, and talk worse without."""
    ids = [i for i, text in special_tokens.items() if text == bos]
    if not ids:
        return None
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    sequence = lambda name: {"Sequence": {"id": name, "type_id": 0}}  # noqa: E731
    return {
        "type": "TemplateProcessing",
        "single": [start, sequence("A")],
        "pair": [start, sequence("A"), sequence("B")],
        "special_tokens": {bos: {"id": bos, "ids": ids[:1], "tokens": [bos]}},
    }


def write_tokenizer_config(
    directory: Path, roles: Mapping[str, str], special_tokens: Iterable[str] = ()
) -> None:
    """Special tokens that are not in `roles` get the role of that name, or are additional ones."""
    texts = list(special_tokens)
    usual = {role: text for text, role in _USUAL_ROLES.items() if text in texts}
    roles = {**usual, **roles}
    others = [text for text in texts if text not in roles.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **roles,
    }
    if others:
        config["additional_special_tokens"] = others
    _write_json(directory / "tokenizer_config.json", config)


def bpe_model(
    vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], **options: Any
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
        **options,
    }


def merges_in_order(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """The merges of a BPE whose rule is "join the neighbours whose union comes first in `pieces`".

    That is how SentencePiece and tiktoken encode. Each way to cut a piece in two known pieces is one
    merge; among them the longer left half goes first, as in a run of equal characters, which such
    encoders join from the left.
    """
    pieces = list(pieces)
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in known and piece[cut:] in known
    ]


def byte_level_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return alphabet


def _added_token(token_id: int, text: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
