"""Token shards: plain .npy files of token ids, and the index that says what they were made from.

    <shards>/<source key>/train/shard-00000.npy      uint16 (uint32 past 65535 ids), one dimension
    <shards>/<source key>/held_out/shard-00000.npy
    <shards>/<source key>/held_out.jsonl             index, name, bytes and tokens of each document
    <shards>/<source key>/index.json
    <shards>/<source key>/parts/00000.json           while preparing: the finished shards

A shard is the work on one fixed range of the shuffled documents, so its bytes do not depend on how
many processes worked or how often they were killed. Its part file is written last: what has one is
finished.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Tokenizer
from llm_jax.data.atomic import NPY_HEADER_BYTES, AtomicFile, NpyWriter, write_json
from llm_jax.data.documents import (
    COUNTS,
    Document,
    DocumentReader,
    batched_by_size,
    token_dtype,
    tokenize_documents,
)

FORMAT = 1
SPLITS = ("train", "held_out")
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the bytes of the shards depend on. Two equal plans give equal shards.

    Attributes:
      tokenizer: its fingerprint.
      source: the source's fingerprint.
      documents: how many indices the source has.
      documents_per_shard: how many of them one shard covers, held-out ones among them.
    """

    tokenizer: str
    source: str
    documents: int
    documents_per_shard: int
    shuffle_seed: int
    held_out_threshold: int
    dtype: str
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        return -(-self.documents // self.documents_per_shard)

    def range_of(self, shard: int) -> tuple[int, int]:
        """The places in the shuffled order that a shard covers."""
        start = shard * self.documents_per_shard
        return start, min(start + self.documents_per_shard, self.documents)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file. first_document: the place of its range in the shuffled order."""

    file: str
    documents: int
    tokens: int
    text_bytes: int
    first_document: int


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """index.json of one source. `shards` is by split, and empty until `complete`."""

    folder: Path
    plan: Plan
    source: dict[str, Any]
    complete: bool
    counts: dict[str, int]
    shards: dict[str, tuple[Shard, ...]]

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards[split])

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.shards[split])

    def text_bytes(self, split: str) -> int:
        return sum(shard.text_bytes for shard in self.shards[split])

    def save(self) -> None:
        value = dataclasses.asdict(self)
        del value["folder"]
        write_json(self.folder / "index.json", value)

    @staticmethod
    def load(folder: Path) -> "ShardIndex | None":
        """None where preparing has not begun."""
        path = folder / "index.json"
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text())
            shards = {
                split: tuple(Shard(**shard) for shard in value["shards"][split]) for split in SPLITS
            }
            return ShardIndex(
                folder=folder, **value | {"plan": Plan(**value["plan"]), "shards": shards}
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is no index of token shards ({error}): delete {folder}"
            ) from None

    def held_out_documents(self) -> Iterator[dict[str, Any]]:
        """{"index", "name", "text_bytes", "tokens"}; `source[index]` has the text."""
        with open(self.folder / "held_out.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)


def write_shard(
    folder: Path,
    plan: Plan,
    shard: int,
    indices: np.ndarray,
    reader: DocumentReader,
    tokenizer: Tokenizer,
) -> dict[str, int]:
    """Tokenizes the documents `indices` of a source into the files of one shard.

    Only a batch of documents is in memory. Returns what the reader counted.
    """
    name = f"shard-{shard:05d}.npy"
    held_out: list[dict[str, Any]] = []
    totals = {split: Counter(documents=0, tokens=0, text_bytes=0) for split in SPLITS}
    reader.counts = Counter(dict.fromkeys(COUNTS, 0))
    dtype = np.dtype(plan.dtype)
    train, held = (NpyWriter(folder / split / name, dtype) for split in SPLITS)
    with train, held:
        documents = reader.many(map(int, indices))
        for batch in batched_by_size(documents, _BATCH_BYTES, _BATCH_DOCUMENTS):
            tokens = tokenize_documents(tokenizer, [document.text for document in batch])
            for document, ids in zip(batch, tokens, strict=True):
                split = "held_out" if document.is_held_out else "train"
                totals[split].update(documents=1, tokens=len(ids), text_bytes=document.text_bytes)
                if document.is_held_out:
                    held_out.append(_held_out_entry(document, len(ids)))
            _append(train, batch, tokens, is_held_out=False)
            _append(held, batch, tokens, is_held_out=True)
    part = {"counts": dict(reader.counts), "splits": totals, "held_out": held_out}
    write_json(_part_path(folder, shard), part)
    return part["counts"]


def read_part(folder: Path, shard: int) -> dict[str, Any] | None:
    """What `write_shard` left, or None where the shard is not finished."""
    path = _part_path(folder, shard)
    return json.loads(path.read_text()) if path.exists() else None


def start_index(folder: Path, plan: Plan, source: dict[str, Any]) -> ShardIndex:
    """Makes the folders and the index of shards that are all still to be written."""
    for name in (*SPLITS, "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    index = ShardIndex(folder, plan, source, False, {}, dict.fromkeys(SPLITS, ()))
    index.save()
    return index


def finish_index(index: ShardIndex) -> ShardIndex:
    """Joins the parts into held_out.jsonl and a complete index.json."""
    folder, plan = index.folder, index.plan
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    with AtomicFile(folder / "held_out.jsonl") as held_out:
        for number in range(plan.num_shards):
            part = read_part(folder, number)
            counts.update(part["counts"])
            for split in SPLITS:
                file = f"{split}/shard-{number:05d}.npy"
                first = plan.range_of(number)[0]
                if part["splits"][split]["tokens"]:
                    shards[split].append(
                        Shard(file=file, first_document=first, **part["splits"][split])
                    )
            for entry in part["held_out"]:
                held_out.file.write((json.dumps(entry) + "\n").encode())
    complete = dataclasses.replace(
        index,
        complete=True,
        counts=dict(counts),
        shards={split: tuple(found) for split, found in shards.items()},
    )
    complete.save()
    shutil.rmtree(folder / "parts")
    return complete


def check_files(index: ShardIndex) -> None:
    """Raises ConfigError if a shard is missing or not as long as the index says."""
    item = np.dtype(index.plan.dtype).itemsize
    for split in SPLITS:
        for shard in index.shards[split]:
            path = index.folder / shard.file
            expected = NPY_HEADER_BYTES + shard.tokens * item
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                found = "missing" if size is None else f"{size} bytes long, not {expected}"
                raise ConfigError(f"{path} is {found}: delete {index.folder} and prepare again")


def plan_dtype(tokenizer: Tokenizer) -> str:
    return token_dtype(tokenizer.vocab_size).str


def _append(
    writer: NpyWriter, batch: list[Document], tokens: list[np.ndarray], is_held_out: bool
) -> None:
    chosen = [t for d, t in zip(batch, tokens, strict=True) if d.is_held_out == is_held_out]
    if chosen:
        writer.append(np.concatenate(chosen))


def _held_out_entry(document: Document, tokens: int) -> dict[str, Any]:
    return {
        "index": document.index,
        "name": document.name,
        "text_bytes": document.text_bytes,
        "tokens": tokens,
    }


def _part_path(folder: Path, shard: int) -> Path:
    return folder / "parts" / f"{shard:05d}.json"
