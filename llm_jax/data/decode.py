"""Bytes to text, with nothing lost unsaid: what is no UTF-8 is replaced, counted and reported."""

import io
import re
import tokenize
from collections.abc import Callable
from typing import Literal

from llm_jax.core.config import ConfigError

Undecodable = Literal["replace", "skip", "error"]

_SURROGATES = re.compile("[\ud800-\udfff]")


def decode(
    raw: bytes, name: str, policy: Undecodable, head: Callable[[], bytes] | None = None
) -> dict:
    """A source's record from a document's bytes.

    UTF-8 first; then, for a Python file, the coding that its first two lines declare (PEP 263).

    Args:
      name: the document's name, for the record and for messages.
      policy: what becomes of bytes that have no meaning: each is replaced by U+FFFD, or the document
        is left out, or a ConfigError is raised.
      head: reads the beginning of the Python file that `raw` is a piece of; None for other files.

    Returns:
      {"text", "name"} and, where bytes had no meaning, "undecodable": how many.
    """
    try:
        return {"text": raw.decode("utf-8"), "name": name}
    except UnicodeDecodeError:
        pass
    if head is not None and (text := _decode_declared(raw, head())) is not None:
        return {"text": text, "name": name}
    return replace_surrogates(raw.decode("utf-8", "surrogateescape"), name, policy)


def replace_surrogates(text: str, name: str, policy: Undecodable) -> dict:
    """The record of a text that holds lone surrogates, which stand for no character."""
    text, count = _SURROGATES.subn("\ufffd", text)
    if policy == "error":
        raise ConfigError(
            f"{name} has {count} bytes that are no UTF-8: mend it, exclude it, or set undecodable to "
            "'replace' or 'skip'"
        )
    return {"text": "" if policy == "skip" else text, "name": name, "undecodable": count}


def record_of(text: str, name: str, policy: Undecodable) -> dict:
    """The record of a text that some parser made, which may hold lone surrogates."""
    if text.isascii() or not _SURROGATES.search(text):
        return {"text": text, "name": name}
    return replace_surrogates(text, name, policy)


def _decode_declared(raw: bytes, head: bytes) -> str | None:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(head).readline)
        return None if encoding.startswith("utf-8") else raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
