"""Where documents come from: one file per kind, each with a `Config` and `make(config, cache)`.

`source_for` turns what a user writes after `--data` into a section of the config; `open_source`
opens a parsed one.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_jax.core.config import ConfigError, component, to_dict
from llm_jax.data.fields import Record
from llm_jax.data.files import find_files
from llm_jax.data.sources import jsonl, parquet

_STRUCTURED = {"parquet": parquet.SUFFIXES, "jsonl": jsonl.SUFFIXES}
_COMPANIONS = ("README*", "LICENSE*", "readme*", "license*")


class DocumentSource(Protocol):
    """A `core.types.Source` with what shuffling and checking need.

    `source[i]` is {"text": str, "name": str}; further keys tell of trouble: "undecodable": how many
    bytes had no meaning, "malformed": True where the record could not be read. An empty text is no
    document. `source.record(i)` has all fields instead of the text.

    Attributes:
      fingerprint: changes when the documents or their order do.
      group_starts: [G + 1] int64 where reading one document reads its whole group; else None.
      split_ids: where records are always sound and slow to make, gives numbers by which they are held
        out, [N] int64 of indices [N] int64; else None, and their contents decide.
    """

    fingerprint: str
    group_starts: np.ndarray | None
    split_ids: Callable[[np.ndarray], np.ndarray] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def record(self, index: int) -> Record: ...

    def check_text(self) -> None:
        """Raises ConfigError where the source's records have no field `text_key`."""


def open_source(config: Any, cache: Path, *, as_records: bool = False) -> DocumentSource:
    """Opens the source of a parsed section; `cache` takes line indices and decompressed copies.

    Args:
      as_records: only `record` will be read, so that no field has to be the text.
    """
    source = component("data.sources", config.name).make(config, cache)
    if not as_records:
        source.check_text()
    return source


def source_key(config: Any) -> str:
    """A folder name for what is made from this source: readable, and unique to its settings."""
    settings = {k: v for k, v in to_dict(config).items() if k != "weight"}
    if settings.get("columns", ()) is None:
        del settings["columns"]  # younger than shards that people have
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4)
    stem = re.sub(r"\W+", "-", os.path.basename(config.path.rstrip("/"))).strip("-")[:40]
    return f"{stem or config.name}-{digest.hexdigest()}"


def source_for(path: str) -> dict[str, str]:
    """The section that reads `path`: a file, folder, glob, URL, `tfds:NAME` or `hf:ID`.

    Raises:
      ConfigError: nothing is there, or a folder holds several kinds of files.
    """
    for name in ("tfds", "hf"):
        if path.startswith(f"{name}:"):
            return {"name": name, "path": path[len(name) + 1 :]}
    if path.startswith("python:"):
        return {"name": "text", "path": path}
    files = find_files(path)
    if len(files) > 1:
        files = find_files(path, exclude=_COMPANIONS)
    kinds = Counter(_kind(name) for name in files.names)
    if len(kinds) > 1 and set(kinds) & set(_STRUCTURED):
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        first = sorted(set(kinds) & set(_STRUCTURED))[0]
        raise ConfigError(
            f"data: {path!r} holds several kinds of files ({found}): name one by a glob, such as "
            f"'{path.rstrip('/')}/**/*{_STRUCTURED[first][0]}'"
        )
    return {"name": next(iter(kinds)), "path": path}


def _kind(name: str) -> str:
    for kind, suffixes in _STRUCTURED.items():
        if name.lower().endswith(suffixes):
            return kind
    return "text"
