"""The `data` section of a config: which documents, which tokenizer, how they become rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_jax.core.config import ConfigError, load, parse, parse_component
from llm_jax.data.sources import source_for, source_key
from llm_jax.data.split import held_out_threshold

if TYPE_CHECKING:
    import ml_collections


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data`.

    Attributes:
      sequence_length: positions of one row, T.
      sources: sections `{"name": "text", "path": ..., "weight": 1.0, ...}`; `name` picks a module of
        data/sources. Weights are shares of rows (mode "shards") or of documents (mode "stream"),
        whatever the sources' sizes.
      tokenizer: a section whose `name` picks a module of data/tokenizers.
      mode: "shards" tokenizes once into files, "stream" tokenizes while training.
      shards_path: where shards, the tokenizer and caches go. None: WORKDIR/data.
      shuffle_seed: of every order in the data.
      held_out_fraction: share of documents kept out of training; 0 for none. Small sources hold out
        about 8 documents all the same.
      held_out_documents_max: per source, about; lowers the fraction.
      malformed_fraction_max: give up where more of a source's records cannot be read.
      num_workers: processes that tokenize shards. None: one per core.
      num_threads: threads that read ahead; 0 reads in the caller's thread.
      prefetch_batches: how many batches to read ahead.
    """

    sequence_length: int = 1024
    sources: tuple[Any, ...] = ()
    tokenizer: Any = dataclasses.field(default_factory=lambda: {"name": "sentencepiece"})
    mode: Literal["shards", "stream"] = "shards"
    shards_path: str | None = None
    shuffle_seed: int = 0
    held_out_fraction: float = 0.01
    held_out_documents_max: int | None = None
    malformed_fraction_max: float = 0.01
    num_workers: int | None = None
    num_threads: int = 1
    prefetch_batches: int = 4

    def __post_init__(self):
        sources = tuple(
            source if dataclasses.is_dataclass(source) else _parse_source(source, number)
            for number, source in enumerate(self.sources)
        )
        object.__setattr__(self, "sources", sources)
        if not dataclasses.is_dataclass(self.tokenizer):
            tokenizer = parse_component("data.tokenizers", self.tokenizer, "data.tokenizer")
            object.__setattr__(self, "tokenizer", tokenizer)
        self._check()

    def _check(self) -> None:
        least = {"sequence_length": 1, "num_threads": 0, "prefetch_batches": 1}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise ConfigError(
                    f"data.{field} = {getattr(self, field)}: expected at least {bound}"
                )
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(f"data.num_workers = {self.num_workers}: expected at least 1 or None")
        held_out_threshold(1, self.held_out_fraction)
        keys = [source_key(source) for source in self.sources]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                path = self.sources[number].path
                raise ConfigError(
                    f"data.sources names {path!r} twice: give it one entry and a weight"
                )


def resolve_data(section: DataConfig | Mapping | None) -> DataConfig:
    """Parses the section `data`, the sources' and the tokenizer's own sections with it.

    `to_dict(resolve_data(section))` is a section again.
    """
    return parse(DataConfig, section, "data")


def load_with_data(
    path: str, overrides: Sequence[str], data: str | None
) -> "ml_collections.ConfigDict":
    """Reads a config file; `data`, a path or an id, takes the place of its sources."""
    config = load(path, overrides)
    if data is not None:
        if config.get("data") is None:
            config.data = {}
        config.data.sources = (source_for(data),)
    return config


def shards_folder(data: DataConfig, workdir: Path) -> Path:
    """Where the shards, the tokenizer and the caches of this run are.

    Raises:
      ConfigError: no sources, or a URL, which cannot be read by offset cheaply enough.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty: name one in the config, or pass --data PATH")
    path = data.shards_path
    if path is not None and "://" in path:
        raise ConfigError(
            f"data.shards_path = {path!r}: expected a folder of a local or mounted file system"
        )
    return Path(workdir) / "data" if path is None else Path(path).expanduser()


def _parse_source(section: Any, number: int) -> Any:
    return parse_component("data.sources", section, f"data.sources.{number}")
