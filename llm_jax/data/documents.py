"""Documents on their way from a source to token ids, counted as they pass.

A document's tokens are `[bos] + ids + [eos]`; where bos and eos are one id it stands once, in front.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Tokenizer
from llm_jax.data.config import DataConfig
from llm_jax.data.shuffle import EndlessOrder, GroupedOrder
from llm_jax.data.sources import DocumentSource, source_key
from llm_jax.data.split import held_out_threshold, is_held_out

COUNTS = ("documents", "empty", "malformed", "undecodable_documents", "undecodable_bytes")


@dataclasses.dataclass(frozen=True)
class Document:
    """text_bytes: the length of `text` in UTF-8."""

    index: int
    name: str
    text: str
    text_bytes: int
    is_held_out: bool


class DocumentReader:
    """Reads documents of one source by index and counts what was wrong with them.

    Attributes:
      counts: of all documents read so far, by the names in `COUNTS`.
    """

    def __init__(self, source: DocumentSource, held_out_threshold: int):
        self._source, self._threshold = source, held_out_threshold
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTS, 0))

    def __call__(self, index: int) -> Document | None:
        """None where there is no document: an empty text or an unreadable record."""
        record = self._source[index]
        self.counts["documents"] += 1
        if record.get("malformed"):
            self.counts["malformed"] += 1
            return None
        if record.get("undecodable"):
            self.counts["undecodable_documents"] += 1
            self.counts["undecodable_bytes"] += record["undecodable"]
        if not record["text"]:
            self.counts["empty"] += 1
            return None
        text = record["text"]
        raw = text.encode("utf-8")
        held_out = is_held_out(raw, self._threshold)
        return Document(index, record["name"], text, len(raw), held_out)

    def many(self, indices: Iterator[int]) -> Iterator[Document]:
        return (document for index in indices if (document := self(index)) is not None)


def document_order(source: DocumentSource, config: Any, seed: int) -> EndlessOrder:
    """The order in which a source's documents are gone through, in shards and in streams."""
    name = f"{source_key(config)} documents"
    if source.group_starts is not None:
        return GroupedOrder(source.group_starts, seed, name)
    return EndlessOrder(len(source), seed, name)


def source_threshold(data: DataConfig, source: DocumentSource) -> int:
    return held_out_threshold(
        len(source), data.held_out_fraction, at_most=data.held_out_documents_max
    )


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 65535 else np.dtype("<u4")


def tokenize_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text's tokens with its borders, [N] uint16 or uint32.

    Raises:
      ValueError: the tokenizer yields its own bos or eos from plain text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    borders = (bos,) if bos == eos else (bos, eos)
    result = []
    for ids in tokenizer.encode_batch(texts):
        tokens = np.empty(len(ids) + len(borders), dtype)
        tokens[0] = bos
        tokens[1 : 1 + len(ids)] = np.fromiter(ids, dtype, len(ids))
        tokens[1 + len(ids) :] = borders[1:]
        result.append(tokens)
    joined = np.concatenate(result) if result else np.zeros(0, dtype)
    for border in borders:
        if np.count_nonzero(joined == border) != len(result):
            raise ValueError(f"the tokenizer yields its border token {border} from plain text")
    return result


def batched_by_size(
    documents: Iterator[Document], most_bytes: int, most: int
) -> Iterator[list[Document]]:
    """Groups of at most `most` documents that stop growing once they hold `most_bytes` of text."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += document.text_bytes
        if size >= most_bytes or len(group) >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def problems(counts: dict[str, int]) -> list[str]:
    """One sentence for each kind of trouble; an empty list if there was none."""
    lines = []
    if counts["undecodable_documents"]:
        lines.append(
            f"{counts['undecodable_documents']} documents had {counts['undecodable_bytes']} bytes "
            "that are no UTF-8, replaced by U+FFFD (or the document left out: see undecodable)"
        )
    if counts["malformed"]:
        lines.append(f"{counts['malformed']} records could not be read and were left out")
    if counts["empty"]:
        lines.append(f"{counts['empty']} documents were empty and were left out")
    return lines


def check_malformed(counts: dict[str, int], total: int, most: float, path: str) -> None:
    """Gives up once more than the share `most` of `total` records could not be read."""
    if counts["malformed"] > most * total:
        raise ConfigError(
            f"data: {path!r}: {counts['malformed']} of {counts['documents']} records read so far "
            f"could not be read, over data.malformed_fraction_max = {most} of its {total}"
        )


def sample_indices(size: int, most: int) -> list[int]:
    """Evenly spaced indices of a source."""
    return list(itertools.islice(range(0, size, max(1, size // most)), most))
