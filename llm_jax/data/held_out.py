"""The held-out documents of a run, as text again, and its held-out records."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax.data.config import DataConfig, shards_folder
from llm_jax.data.documents import Document, DocumentReader, source_threshold
from llm_jax.data.records import RecordReader, example_of, prepared_records
from llm_jax.data.shards import ShardIndex
from llm_jax.data.sources import open_source, source_key


def held_out_documents(
    data: DataConfig, workdir: Path, most_bytes: int | None = None
) -> Iterator[tuple[str, Document]]:
    """(path of the source, held-out document), source by source, in the order of their index.

    Args:
      most_bytes: about how much text to give in all, shared evenly by the sources; None for all.
    """
    folder = shards_folder(data, workdir)
    share = None if most_bytes is None else most_bytes // len(data.sources)
    for config in data.sources:
        source = open_source(config, folder / "cache")
        reader = DocumentReader(source, source_threshold(data, source))
        index = ShardIndex.load(folder / source_key(config))
        # Shards list their held-out documents; a stream has to look at each.
        listed = index is not None and index.complete
        chosen = (
            sorted(entry["index"] for entry in index.held_out_documents())
            if listed
            else range(len(source))
        )
        given = 0
        for document in reader.many(iter(chosen)):
            if share is not None and given and given + document.text_bytes > share:
                break
            if document.is_held_out:
                given += document.text_bytes
                yield config.path, document


def held_out_records(data: DataConfig, workdir: Path) -> Iterator[dict[str, Any]]:
    """Held-out records as objectives see them; sources take turns, so that the first few are of all."""
    sources, indices = prepared_records(data, workdir)
    readers = [RecordReader(source) for source in sources]
    chosen = [index.indices("held_out") for index in indices]
    for place in range(max(map(len, chosen))):
        for reader, held_out in zip(readers, chosen, strict=True):
            if place < len(held_out):
                yield example_of(reader.sound(int(held_out[place])))
