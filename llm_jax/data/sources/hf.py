"""Hugging Face datasets: `--data hf:ID` (extra `hf`), read as a map-style Arrow dataset."""

import dataclasses
import hashlib
import importlib
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError, nearest
from llm_jax.data.decode import Undecodable, record_of
from llm_jax.data.fields import Record, record_of_values


@dataclasses.dataclass(frozen=True)
class Config:
    """What `datasets.load_dataset` is given.

    Attributes:
      path: the dataset's id or a local folder.
      config_name: the dataset's configuration, if it has several.
      revision: a commit or tag. Absent: the newest, which may change between runs.
      text_key: the column of the text.
    """

    path: str
    name: str = "hf"
    weight: float = 1.0
    text_key: str = "text"
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    undecodable: Undecodable = "replace"


class HuggingFaceSource:
    """Documents by index. Arrow files are mapped, so any row is read alone."""

    group_starts = None
    split_ids = None

    def __init__(self, config: Config, dataset: Any):
        self._config, self._dataset = config, dataset
        if not len(dataset):
            raise ConfigError(f"data: hf:{config.path} split {config.split!r} holds no row")
        key = f"{config.path} {config.config_name} {config.split} {config.revision} {len(dataset)}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._dataset[int(index)][self._config.text_key]
        name = f"{self._config.path}:{self._config.split}:{index}"
        if not isinstance(value, str):
            return {"text": "", "name": name, "malformed": True}
        return record_of(value, name, self._config.undecodable)

    def record(self, index: int) -> Record:
        """All columns; a label is its number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self._config.path}:{self._config.split}:{index}"
        return record_of_values(self._dataset[int(index)], name, self._config.undecodable)

    def check_text(self) -> None:
        key, columns = self._config.text_key, self._dataset.column_names
        if key not in columns:
            raise ConfigError(
                f"data: hf:{self._config.path} has no column {key!r}{nearest(key, columns)}; "
                f"its columns: {', '.join(columns)} (set text_key)"
            )


def make(config: Config, cache: Path) -> HuggingFaceSource:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError('an hf source needs datasets: pip install "llm_jax[hf]"') from None
    try:
        dataset = datasets.load_dataset(
            config.path, config.config_name, split=config.split, revision=config.revision
        )
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"data: hf:{config.path} cannot be loaded: {reason}") from None
    return HuggingFaceSource(config, dataset)
