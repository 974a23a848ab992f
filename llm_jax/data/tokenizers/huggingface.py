"""A Hugging Face `tokenizer.json` through the `tokenizers` package: `pip install "llm_jax[hf]"`.

Two families give back every byte: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte
fallback (Llama 2, Gemma). Their ids are turned into a table of bytes here, because `tokenizers` only
decodes to str. Others (BERT's WordPiece) lose case or spaces and need `lossless=False`.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.huggingface_files import byte_level_alphabet, write_tokenizer_config
from llm_jax.data.tokenizers.pieces import META_SPACE, MetaSpaceTokenizer, reject_surrogates

_ROLES = ("bos_token", "eos_token", "pad_token")
_ROLES_OF_ENCODERS = ("cls_token", "sep_token", "mask_token")
_CHAT_TEMPLATE = "chat_template.jinja"
_PROBES = (
    "def f(x):\n    return  x\r\n\n\t# end  ",
    " one  two Three, it's 1234567 don 't . ",
    "中文 字符 é e\u0301 ﬁ Ａ 😀👨‍👩‍👧 \ufeff\u00a0\u2028",
    "\x00\x01\x7f <s></s><unk><pad><|endoftext|><0x41> [MASK]",
    "▁ x▁▁y",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """path: a tokenizer.json, or the directory it is in.

    bos_token, eos_token, pad_token: None takes them from tokenizer_config.json beside it; bos and pad
      fall back to eos, bos and eos of an encoder that has none (BERT) to its cls and sep.
    lossless: refuse a tokenizer that cannot give back every text.
    """

    name: str = "huggingface"
    path: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    lossless: bool = True


class HuggingFaceTokenizer(MetaSpaceTokenizer):
    """Args: model: the content of tokenizer.json; roles: bos_token, eos_token, ... -> text.

    chat_template: Jinja source of the layout of chats, or None.
    """

    name = "huggingface"
    model_file = "tokenizer.json"

    def __init__(self, model: bytes, roles: Mapping[str, str], chat_template: str | None = None):
        _require_tokenizers()
        import tokenizers

        self._model, self.chat_template = model, chat_template
        self._roles = dict(roles)
        description = json.loads(model)
        rule = _DecodingRule.of(description)
        if rule is not None and rule.strips_space and _remove_dummy_prefix(description):
            self._space = " "
        self._library = tokenizers.Tokenizer.from_str(json.dumps(description))
        self._library.encode_special_tokens = True  # a literal "<s>" is text
        self._library.no_padding()
        self._library.no_truncation()
        pieces = dict(self._library.get_vocab(with_added_tokens=True))
        size = max(pieces.values()) + 1
        table = [""] * size
        for text, token_id in pieces.items():
            table[token_id] = text
        added = self._library.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        special |= {self._id_of(text): text for text in self._roles.values()}
        self._by_library = rule is None
        plain = {i for i, token in added.items() if not token.special}
        super().__init__(
            [
                text.encode("utf-8") if rule is None or i in plain else rule.bytes_of(text)
                for i, text in enumerate(table)
            ],
            special,
            bos_id=self._id_of(self._roles["bos_token"]),
            eos_id=self._id_of(self._roles["eos_token"]),
            pad_id=self._id_of(self._roles["pad_token"]),
            prefix=b" " if rule is not None and rule.strips_space else b"",
        )
        self._ids_by_text |= {token.content: i for i, token in added.items()}
        if rule is not None and rule.meta_space:
            self._mark_ids = [self._id_of(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        if not self._by_library:
            return super().decode(ids)
        kept = [int(i) for i in ids if int(i) not in self.special_tokens]
        return self._library.decode(kept, skip_special_tokens=False)

    def model_bytes(self) -> bytes:
        return self._model

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"roles": self._roles}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        return settings

    def save_huggingface(self, directory: Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.model_file).write_bytes(self._model)
        write_tokenizer_config(directory, self._roles)
        if self.chat_template is not None:
            (directory / _CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")

    def _encode(self, text: str) -> list[int]:
        reject_surrogates([text])
        return self._library.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        reject_surrogates(texts)
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _id_of(self, text: str) -> int:
        token_id = self._library.token_to_id(text)
        if token_id is None:
            raise ConfigError(f"this tokenizer.json has no token {text!r}")
        return token_id


@dataclasses.dataclass(frozen=True)
class _DecodingRule:
    """How the decoder section of a tokenizer.json turns a piece into bytes."""

    byte_level: dict[str, int] | None = None
    meta_space: bool = False
    strips_space: bool = False

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> "_DecodingRule | None":
        """None where pieces are not simply joined."""
        decoder = tokenizer.get("decoder") or {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        kinds = {step.get("type") for step in steps}
        if "ByteLevel" in kinds:
            return cls(byte_level={c: byte for byte, c in enumerate(byte_level_alphabet())})
        if "ByteFallback" not in kinds:
            return None
        return cls(
            meta_space=any(
                step.get("type") == "Metaspace"
                or (step.get("type") == "Replace" and step["pattern"].get("String") == META_SPACE)
                for step in steps
            ),
            strips_space=any(step.get("type") == "Strip" and step["start"] for step in steps),
        )

    def bytes_of(self, text: str) -> bytes:
        if self.byte_level is not None:
            if all(character in self.byte_level for character in text):
                return bytes(self.byte_level[character] for character in text)
            return text.encode("utf-8")
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return (text.replace(META_SPACE, " ") if self.meta_space else text).encode("utf-8")


def _remove_dummy_prefix(tokenizer: dict[str, Any]) -> bool:
    """Takes the step that puts a space before every text out of a tokenizer.json; was there one?"""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
        return True
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer["prepend_scheme"] != "never":
        tokenizer["pre_tokenizer"] = {**pre_tokenizer, "prepend_scheme": "never"}
        return True
    return False


def make(config: Config) -> HuggingFaceTokenizer:
    """Reads the tokenizer.json at `config.path`; raises ConfigError where it cannot serve."""
    _require_tokenizers()
    if config.path is None:
        raise ConfigError("huggingface needs path: a tokenizer.json or the directory it is in")
    path = Path(config.path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"no tokenizer.json at {path}")
    try:
        written = _written_config(path)
        roles, template = _roles(config, written), _chat_template(path, written)
        tokenizer = HuggingFaceTokenizer(path.read_bytes(), roles, template)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise ConfigError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from None
    if config.lossless:
        for probe in _PROBES:
            if tokenizer.decode(tokenizer.encode(probe)) != probe:
                raise ConfigError(
                    f"{path} cannot give back every text, e.g. {probe!r}; lossless=False takes it"
                )
    return tokenizer


def from_model(
    model: bytes, settings: Mapping[str, Any], num_threads: int | None
) -> HuggingFaceTokenizer:
    """num_threads: not used; the library takes RAYON_NUM_THREADS from the environment."""
    return HuggingFaceTokenizer(model, settings["roles"], settings.get("chat_template"))


def _written_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json beside a tokenizer.json, or {}."""
    beside = path.parent / "tokenizer_config.json"
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def _chat_template(path: Path, written: Mapping[str, Any]) -> str | None:
    """Of the file of its own that transformers 5 writes, or the key of older ones; of several the default."""
    beside = path.parent / _CHAT_TEMPLATE
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = written.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _roles(config: Config, written: Mapping[str, Any]) -> dict[str, str]:
    named = {role: value for role, value in written.items() if role in _ROLES + _ROLES_OF_ENCODERS}
    named |= {role: value for role in _ROLES if (value := getattr(config, role)) is not None}
    roles = {
        role: value["content"] if isinstance(value, dict) else value
        for role, value in named.items()
        if value is not None
    }
    if "eos_token" not in roles and {"cls_token", "sep_token"} <= roles.keys():
        roles = {"bos_token": roles["cls_token"], "eos_token": roles["sep_token"]} | roles
    if "eos_token" not in roles:
        raise ConfigError("no eos token: set eos_token, or put tokenizer_config.json beside it")
    return dict.fromkeys(_ROLES, roles["eos_token"]) | roles


def _require_tokenizers() -> None:
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError('tokenizer huggingface needs: pip install "llm_jax[hf]"')
