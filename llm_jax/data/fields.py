"""Records, as every source gives them: plain Python values by field, with no lone surrogate.

What is no UTF-8 follows the source's `undecodable`, as in texts (see data/decode.py).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.data.decode import Undecodable, replace_surrogates


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a source.

    Attributes:
      name: for messages.
      fields: strings, numbers, booleans, None, and lists and dicts of them; {} where there is nothing.
      malformed: the record could not be read.
      undecodable: how many of its bytes had no meaning.
    """

    name: str
    fields: dict[str, Any]
    malformed: bool = False
    undecodable: int = 0


def record_of_values(values: Mapping[str, Any], name: str, policy: Undecodable) -> Record:
    """The record of what some parser made: bytes are decoded, arrays become lists."""
    cleaner = _Cleaner(name, policy)
    fields = cleaner.clean(values)
    if cleaner.undecodable and policy == "skip":
        fields = {}
    return Record(name, fields, undecodable=cleaner.undecodable)


def canonical(fields: Mapping[str, Any]) -> bytes:
    """JSON that does not depend on the order of the keys: equal records have equal bytes."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8")


def texts_of(value: Any) -> Iterator[str]:
    """All strings in a record's fields, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)


class _Cleaner:
    def __init__(self, name: str, policy: Undecodable):
        self._name, self._policy = name, policy
        self.undecodable = 0

    def clean(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return value if value.isascii() else self._text(value)
        if isinstance(value, bytes):
            return self._text(value.decode("utf-8", "surrogateescape"))
        if isinstance(value, Mapping):
            return {self.clean(str(key)): self.clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(inner) for inner in value]
        if isinstance(value, np.ndarray | np.generic):
            return self.clean(value.tolist())
        return str(value)  # dates, decimals

    def _text(self, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            replaced = replace_surrogates(text, self._name, self._policy)
            self.undecodable += replaced["undecodable"]
            return replaced["text"]
        return text
