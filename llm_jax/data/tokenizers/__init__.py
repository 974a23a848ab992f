"""Tokenizers: text to ids and back, byte for byte.

One file per kind, found by the config's `name`: `sentencepiece` (trained here, or an existing model),
`raw_bytes`, `tiktoken`, `huggingface`. What is unusual: for every str without lone surrogates
`decode(encode(text)) == text`, and no plain text, not even a literal `<s>`, is encoded as a special
token. A model that cannot promise the first is refused unless its config says `lossless=False`.

A module of this folder that names a kind has

    Config                                    frozen dataclass with a `name`
    make(config) -> PieceTokenizer            nothing to train
    from_model(model, settings, num_threads)  what `load_tokenizer` calls
    train(config, texts, progress)            optional; used where `needs_training(config)`
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError, component
from llm_jax.data.tokenizers.pieces import META_FILE, PieceTokenizer

Progress = Callable[[str], None]


def make_tokenizer(
    config: Any,
    texts: Callable[[], Iterable[str]],
    progress: Progress | None = None,
) -> PieceTokenizer:
    """Trains the tokenizer that `config` asks for, or loads it where there is nothing to train.

    Args:
      config: a parsed `Config` of one of the modules here.
      texts: called once if there is training to do; documents in a fixed order.
      progress: called with one line at each stage of training.
    """
    module = component("data.tokenizers", config.name)
    if hasattr(module, "train") and module.needs_training(config):
        return module.train(config, texts(), progress)
    return module.make(config)


def load_tokenizer(directory: Path, *, num_threads: int | None = None) -> PieceTokenizer:
    """Reads what `Tokenizer.save(directory)` wrote.

    Args:
      num_threads: threads of `encode_batch`; None is all cores.

    Raises:
      ConfigError: no tokenizer there, or its model is not the one that was saved.
    """
    directory = Path(directory)
    if not (directory / META_FILE).is_file():
        raise ConfigError(f"no tokenizer in {directory}: {META_FILE} is missing")
    meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
    model = b""
    if meta["model_file"] is not None:
        path = directory / meta["model_file"]
        if not path.is_file():
            raise ConfigError(f"no tokenizer in {directory}: {meta['model_file']} is missing")
        model = path.read_bytes()
    if hashlib.sha256(model).hexdigest() != meta["model_sha256"]:
        raise ConfigError(
            f"{directory / meta['model_file']} is not the model that {META_FILE} names"
        )
    module = component("data.tokenizers", meta["name"])
    tokenizer = module.from_model(model, meta["settings"], num_threads)
    for key in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        if getattr(tokenizer, key) != meta[key]:
            raise ConfigError(
                f"{directory}: {key} is {getattr(tokenizer, key)}, {META_FILE} says {meta[key]}"
            )
    return tokenizer


def fingerprint(tokenizer: PieceTokenizer) -> str:
    """64 hex digits that change with anything that can change an id; kept beside token shards."""
    return tokenizer.fingerprint()
