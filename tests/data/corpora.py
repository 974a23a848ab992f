"""Small corpora and a next-token objective for the tests of the data pipeline."""

import json
from pathlib import Path

import grain
import numpy as np

from llm_jax.core.packing import next_token_batch
from llm_jax.data.config import DataConfig, resolve_data


def make_texts(count: int, name: str = "document", longest: int = 200) -> list[str]:
    """Different texts of 10 to `longest` characters."""
    return [f"{name} {i}: " + "abcdé" * (i * 7919 % (longest // 5)) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def data_config(*paths: str, **settings) -> DataConfig:
    """Sources of JSON lines; a path may be followed by its weight as in `(path, 2.0)`."""
    pairs = [path if isinstance(path, tuple) else (path, 1.0) for path in paths]
    sources = [{"name": "jsonl", "path": path, "weight": weight} for path, weight in pairs]
    defaults = {"tokenizer": {"name": "raw_bytes"}, "sequence_length": 16, "num_workers": 1}
    return resolve_data(defaults | {"sources": sources} | settings)


class NextToken:
    """An objective's half on the host."""

    examples = False
    partner_rows = False

    def row_length(self, sequence_length: int) -> int:
        return sequence_length + 1

    def transforms(self, tokenizer) -> list:
        return [_ToBatch(tokenizer.bos_id, tokenizer.eos_id)]


class RawRows:
    """Rows as they are read, `extra` tokens longer than the sequence."""

    examples = False

    def __init__(self, extra: int = 1, partner_rows: bool = False):
        self._extra, self.partner_rows = extra, partner_rows

    def row_length(self, sequence_length: int) -> int:
        return sequence_length + self._extra

    def transforms(self, tokenizer) -> list:
        return []


class RawRecords:
    """Records as they are read."""

    examples = True
    examples_per_row = 1

    def transforms(self, tokenizer, sequence_length: int) -> list:
        return []


class _ToBatch(grain.transforms.Map):
    def __init__(self, bos_id: int, eos_id: int):
        self._ids = bos_id, eos_id

    def map(self, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return next_token_batch(element["rows"], *self._ids)
