"""TensorFlow Datasets without TensorFlow: `--data tfds:NAME` or `tfds:NAME/config:version`.

Reads a dataset that was prepared as ArrayRecord (random access) through `as_data_source`. Nothing is
downloaded here: preparing a dataset may take hours and needs a decision of its own.
"""

import dataclasses
import hashlib
import importlib
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError, nearest
from llm_jax.data.decode import Undecodable, decode, record_of
from llm_jax.data.fields import Record, record_of_values


@dataclasses.dataclass(frozen=True)
class Config:
    """A prepared dataset.

    Attributes:
      path: NAME, NAME/config, NAME:version or NAME/config:version.
      split: TFDS's slices work ("train[:1%]").
      data_dir: where datasets are prepared. None: TFDS_DATA_DIR or ~/tensorflow_datasets.
      text_key: the feature that holds the text.
    """

    path: str
    name: str = "tfds"
    weight: float = 1.0
    text_key: str = "text"
    split: str = "train"
    data_dir: str | None = None
    undecodable: Undecodable = "replace"


class TfdsSource:
    """Documents by index, in the order of the prepared files."""

    group_starts = None
    split_ids = None

    def __init__(self, config: Config, builder: Any):
        self._config = config
        self._features = list(builder.info.features)
        try:
            self._records = builder.as_data_source(split=config.split)
        except (ValueError, NotImplementedError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"data: tfds:{config.path} split {config.split!r}: {reason}"
            ) from None
        key = f"{builder.info.full_name} {config.split} {len(self._records)}"
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if not len(self._records):
            raise ConfigError(f"data: tfds:{config.path} split {config.split!r} holds no example")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._records[index][self._config.text_key]
        name = f"{self._config.path}:{self._config.split}:{index}"
        if isinstance(value, bytes):
            return decode(value, name, self._config.undecodable)
        return record_of(str(value), name, self._config.undecodable)

    def record(self, index: int) -> Record:
        """All features; a label is its number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self._config.path}:{self._config.split}:{index}"
        return record_of_values(self._records[index], name, self._config.undecodable)

    def check_text(self) -> None:
        key, features = self._config.text_key, self._features
        if key not in features:
            raise ConfigError(
                f"data: tfds:{self._config.path} has no feature {key!r}{nearest(key, features)}; "
                f"its features: {', '.join(features)} (set text_key)"
            )


def make(config: Config, cache: Path) -> TfdsSource:
    datasets = importlib.import_module("tensorflow_datasets")
    try:
        builder = datasets.builder(config.path, data_dir=config.data_dir, try_gcs=False)
    except (ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"data: tfds:{config.path} cannot be opened: {reason}") from None
    if not Path(builder.data_dir).exists():
        raise ConfigError(
            f"data: tfds:{config.path} is not prepared in {builder.data_dir}: run `tfds build "
            f"{config.path} --file_format=array_record` or set data_dir"
        )
    return TfdsSource(config, builder)
