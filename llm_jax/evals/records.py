"""What evaluators ask, from JSON lines: a record a line, its fields those of a dataclass."""

import json
from pathlib import Path
from typing import TypeVar

from llm_jax.core.config import ConfigError, parse

Record = TypeVar("Record")


def read_records(path: str, kind: type[Record]) -> list[Record]:
    """The records of a file, in order; empty lines are passed over.

    Raises:
      ConfigError: no such file, no records in it, or a line that is none; names file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"there is no file {path} of {kind.__name__}s to evaluate with")
    records = []
    with open(file, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    records.append(_record(line, kind, f"{path}:{number}"))
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 text") from None
    if not records:
        raise ConfigError(f"{path} holds no {kind.__name__}")
    return records


def _record(line: str, kind: type[Record], where: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    return parse(kind, value, where)
