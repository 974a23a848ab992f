"""Prepares a run's data: trains the tokenizer, then tokenizes every source into shards, or splits its
records.

Both are done once: a finished tokenizer and finished shards are taken as they are, and a run that
was stopped, even by kill -9, goes on at the first unfinished shard and ends in the same bytes. Work
is split by shard among processes; memory does not grow with the corpus.
"""

import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import functools
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, parse_component, to_dict
from llm_jax.core.types import Tokenizer
from llm_jax.data.atomic import remove_leftovers, write_json
from llm_jax.data.config import DataConfig, resolve_data, shards_folder
from llm_jax.data.documents import (
    DocumentReader,
    check_malformed,
    document_order,
    problems,
    sample_indices,
    source_threshold,
)
from llm_jax.data.progress import Progress, Silent
from llm_jax.data.records import RecordIndex, RecordPlan, split_records
from llm_jax.data.shards import (
    Plan,
    ShardIndex,
    check_files,
    finish_index,
    plan_dtype,
    read_part,
    start_index,
    write_shard,
)
from llm_jax.data.sources import DocumentSource, open_source, source_key
from llm_jax.data.tokenizers import fingerprint, load_tokenizer, make_tokenizer
from llm_jax.data.training_texts import document_texts, record_texts

_SHARD_BYTES = 32 << 20
_SHARDS_LEAST, _SHARDS_MOST = 8, 1024
_ALONE_BYTES = 4 << 20  # starting a process takes as long as tokenizing this much
_MEASURED_DOCUMENTS = 64


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run reads.

    Attributes:
      folder: where all of it is.
      indices: of the shards, one per source; empty in mode "stream" and where records are read.
      records: which records are held out, one per source; empty where documents are read.
    """

    tokenizer: Tokenizer
    folder: Path
    indices: tuple[ShardIndex, ...] = ()
    records: tuple[RecordIndex, ...] = ()

    def lines(self) -> list[str]:
        """For a person: what there is and what was wrong with it."""
        lines = []
        for index in self.indices:
            train, held = (f"{index.tokens(split):,}" for split in ("train", "held_out"))
            tokens = index.tokens("train") + index.tokens("held_out")
            size = index.text_bytes("train") + index.text_bytes("held_out")
            lines.append(
                f"{index.source['path']}: {index.documents('train'):,} documents, {train} tokens to "
                f"train on; {index.documents('held_out'):,} held out, {held} tokens; "
                f"{size / max(tokens, 1):.2f} bytes per token"
            )
            lines += [f"{index.source['path']}: {line}" for line in problems(index.counts)]
        for index in self.records:
            train, held = (f"{index.sizes[split]:,}" for split in ("train", "held_out"))
            lines.append(f"{index.path}: {train} records to train on; {held} held out")
            lines += [f"{index.path}: {line}" for line in problems(index.counts)]
        return lines


def prepare(
    data: DataConfig, workdir: Path, *, examples: bool = False, progress: Progress | None = None
) -> Prepared:
    """Makes what is missing and returns what there is.

    Args:
      workdir: the run's folder; files go below `shards_folder(data, workdir)`.
      examples: the objective's attribute: whether it reads records. Then there are no shards.

    Raises:
      ConfigError: a source cannot be read, or what is there was made with other settings.
    """
    progress = progress or Silent()
    folder = shards_folder(data, workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # Runs may share the folder: the second waits, and finds all made.
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(folder)
        return (_prepare_records if examples else _prepare)(data, folder, progress)


def _prepare(data: DataConfig, folder: Path, progress: Progress) -> Prepared:
    finished = [ShardIndex.load(folder / source_key(config)) for config in data.sources]
    sources = [
        _open_or_missing(config, index, folder, progress)
        for config, index in zip(data.sources, finished, strict=True)
    ]
    texts = functools.partial(document_texts, data, sources)
    tokenizer = prepare_tokenizer(data, folder, texts, progress)
    if data.mode == "stream":
        return Prepared(tokenizer, folder)
    indices = tuple(
        _prepare_source(data, number, source, folder, tokenizer, progress)
        for number, source in enumerate(sources)
    )
    return Prepared(tokenizer, folder, indices)


def _prepare_records(data: DataConfig, folder: Path, progress: Progress) -> Prepared:
    sources = [open_source(config, folder / "cache", as_records=True) for config in data.sources]
    indices = []
    for source, config in zip(sources, data.sources, strict=True):
        plan = RecordPlan(source.fingerprint, len(source), source_threshold(data, source))
        place = folder / source_key(config) / "records"
        index = RecordIndex.load(place)
        if index is None:
            most = data.malformed_fraction_max
            index = split_records(source, config.path, plan, place, most, progress)
        else:
            _check_same(dataclasses.asdict(index.plan), dataclasses.asdict(plan), place, folder)
        indices.append(index)
    texts = functools.partial(record_texts, data, sources, indices)
    tokenizer = prepare_tokenizer(data, folder, texts, progress)
    return Prepared(tokenizer, folder, records=tuple(indices))


def _open_or_missing(
    config: Any, index: ShardIndex | None, folder: Path, progress: Progress
) -> DocumentSource | None:
    """None where the source is gone but its finished shards are here: they are enough to train."""
    try:
        return open_source(config, folder / "cache")
    except ConfigError as error:
        if index is None or not index.complete:
            raise
        progress.say(f"{error}; its finished shards in {index.folder} are used")
        return None


def prepare_tokenizer(
    data: DataConfig, folder: Path, texts: Callable[[], Iterable[str]], progress: Progress
) -> Tokenizer:
    """Loads `folder`/tokenizer, or makes it; `texts` must hold nothing that is held out."""
    place = folder / "tokenizer"
    asked = place / "request.json"
    if asked.exists():
        # Read as a config, so that fields it did not have yet are at their defaults.
        old = parse_component("data.tokenizers", json.loads(asked.read_text()), str(asked))
        _check_same(_request(old), _request(data.tokenizer), place, folder)
        return load_tokenizer(place)
    tokenizer = make_tokenizer(data.tokenizer, texts, progress.say)
    place.mkdir(parents=True, exist_ok=True)
    tokenizer.save(place)
    write_json(asked, _request(data.tokenizer))
    # What is used is what was saved, so that the first run and a later one cannot differ.
    return load_tokenizer(place)


def _request(tokenizer: Any) -> dict[str, Any]:
    return {k: v for k, v in to_dict(tokenizer).items() if k != "num_threads"}


def _prepare_source(
    data: DataConfig,
    number: int,
    source: DocumentSource | None,
    folder: Path,
    tokenizer: Tokenizer,
    progress: Progress,
) -> ShardIndex:
    config = data.sources[number]
    place = folder / source_key(config)
    index = ShardIndex.load(place)
    if source is None:
        plan = dataclasses.replace(index.plan, tokenizer=fingerprint(tokenizer))
    else:
        plan = _make_plan(data, source, tokenizer, index)
    if index is not None:
        old, new = dataclasses.asdict(index.plan), dataclasses.asdict(plan)
        _check_same(old, new, place, folder)
    if index is not None and index.complete:
        check_files(index)
        return index
    index = index or start_index(place, plan, to_dict(config))
    _write_shards(data, number, source, index, tokenizer, progress)
    return finish_index(index)


def _make_plan(
    data: DataConfig, source: DocumentSource, tokenizer: Tokenizer, index: ShardIndex | None
) -> Plan:
    if index is not None and index.plan.source == source.fingerprint:
        per_shard = index.plan.documents_per_shard
    else:
        per_shard = _documents_per_shard(source)
    return Plan(
        tokenizer=fingerprint(tokenizer),
        source=source.fingerprint,
        documents=len(source),
        documents_per_shard=per_shard,
        shuffle_seed=data.shuffle_seed,
        held_out_threshold=source_threshold(data, source),
        dtype=plan_dtype(tokenizer),
    )


def _documents_per_shard(source: DocumentSource) -> int:
    """About 32 MiB of text, in 8 to 1024 shards: enough to share out, few enough to keep open."""
    shards = -(-_text_bytes(source) // _SHARD_BYTES)
    return max(1, -(-len(source) // min(max(shards, _SHARDS_LEAST), _SHARDS_MOST)))


def _text_bytes(source: DocumentSource) -> int:
    """About how much text a source holds, from a sample."""
    chosen = sample_indices(len(source), _MEASURED_DOCUMENTS)
    size = sum(len(source[index]["text"].encode("utf-8")) for index in chosen)
    return size * len(source) // len(chosen)


def _write_shards(
    data: DataConfig,
    number: int,
    source: DocumentSource,
    index: ShardIndex,
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    plan, config = index.plan, data.sources[number]
    counts: Counter[str] = Counter()
    missing = []
    for shard in range(plan.num_shards):
        part = read_part(index.folder, shard)
        missing += [shard] if part is None else []
        counts.update(part["counts"] if part else {})
    progress.start(f"tokenizing {config.path}", plan.documents)
    progress.advance(counts["documents"])
    workers = min(data.num_workers or _cores(), len(missing))
    if workers > 1 and (data.num_workers is not None or _text_bytes(source) > _ALONE_BYTES):
        done = _in_processes(data, number, index, missing, workers)
    else:
        job = _ShardJob(data, number, source, index, tokenizer)
        done = (job(shard) for shard in missing)
    with contextlib.closing(done), contextlib.ExitStack() as stack:
        stack.callback(progress.finish)
        for result in done:
            counts.update(result)
            progress.advance(result["documents"])
            check_malformed(counts, plan.documents, data.malformed_fraction_max, config.path)


class _ShardJob:
    """Writes one shard; holds what all shards of a source share."""

    def __init__(
        self,
        data: DataConfig,
        number: int,
        source: DocumentSource,
        index: ShardIndex,
        tokenizer: Tokenizer,
    ):
        self._index, self._tokenizer = index, tokenizer
        self._order = document_order(source, data.sources[number], data.shuffle_seed)
        self._reader = DocumentReader(source, index.plan.held_out_threshold)

    def __call__(self, shard: int) -> dict[str, int]:
        plan = self._index.plan
        indices = self._order.in_epoch(np.arange(*plan.range_of(shard)), 0)
        return write_shard(self._index.folder, plan, shard, indices, self._reader, self._tokenizer)


_job: _ShardJob | None = None  # of a worker process


def _in_processes(
    data: DataConfig, number: int, index: ShardIndex, shards: list[int], workers: int
) -> Iterator[dict[str, int]]:
    """Counts of shards as they are finished, in no particular order."""
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(to_dict(data), number, str(index.folder)),
    )
    try:
        futures = [pool.submit(_work, shard) for shard in shards]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ConfigError(
            "a tokenizing process was killed (out of memory?): run again to go on, with fewer "
            f"data.num_workers than {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(data: dict[str, Any], number: int, folder: str) -> None:
    global _job
    threading.Thread(target=_die_with_parent, daemon=True).start()
    config = resolve_data(data)
    place = Path(folder)
    source = open_source(config.sources[number], place.parent / "cache")
    index = ShardIndex.load(place)
    if source.fingerprint != index.plan.source:
        raise ConfigError(f"data: {config.sources[number].path!r} changed while it was prepared")
    tokenizer = load_tokenizer(place.parent / "tokenizer", num_threads=1)
    _job = _ShardJob(config, number, source, index, tokenizer)


def _die_with_parent() -> None:
    """A parent that is killed cannot tell its workers, and one would work on beside the next run."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(shard: int) -> dict[str, int]:
    return _job(shard)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_same(old: dict, new: dict, place: Path, folder: Path) -> None:
    """Raises ConfigError naming the first setting that changed since `place` was made."""
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "name", key)):
        if old.get(key) != new.get(key):
            name = "the documents' fingerprint" if key == "source" else key
            raise ConfigError(
                f"{place} was made with {name} = {_short(old.get(key))}, now it is "
                f"{_short(new.get(key))}: set data.shards_path to another folder or delete {folder}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
