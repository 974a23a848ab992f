"""The texts that a tokenizer is trained on: all there is to train on, once, and nothing held out."""

from collections.abc import Iterator

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.config import DataConfig
from llm_jax.data.documents import DocumentReader, document_order, source_threshold
from llm_jax.data.fields import texts_of
from llm_jax.data.mix import Mixture, in_order
from llm_jax.data.records import RecordIndex, RecordReader
from llm_jax.data.shuffle import EndlessOrder
from llm_jax.data.sources import DocumentSource, source_key


def document_texts(data: DataConfig, sources: list[DocumentSource | None]) -> Iterator[str]:
    """Every document to train on once. A source may be None where nothing needs its texts."""
    if any(source is None for source in sources):
        raise ConfigError("there is no tokenizer yet, and a source to train it on is gone")
    orders = [
        document_order(source, config, data.shuffle_seed)
        for source, config in zip(sources, data.sources, strict=True)
    ]
    readers = [DocumentReader(source, source_threshold(data, source)) for source in sources]
    for number, item in _once(data, orders):
        document = readers[number](item)
        if document is not None and not document.is_held_out:
            yield document.text


def record_texts(
    data: DataConfig, sources: list[DocumentSource], indices: list[RecordIndex]
) -> Iterator[str]:
    """Every string in the records to train on once."""
    orders = [
        index.order(source, data.shuffle_seed, source_key(config))
        for index, source, config in zip(indices, sources, data.sources, strict=True)
    ]
    readers = [RecordReader(source) for source in sources]
    train = [index.indices("train") for index in indices]
    for number, item in _once(data, orders):
        record = readers[number](int(train[number][item]))
        yield from texts_of(record.fields)


def _once(data: DataConfig, orders: list[EndlessOrder]) -> Iterator[tuple[int, int]]:
    """(source, item) of every item once, shuffled, sources taking turns by their weights."""
    weights = [
        config.weight if order.size else 0.0
        for config, order in zip(data.sources, orders, strict=True)
    ]
    if not any(weights):
        return
    mixture = Mixture(weights, data.shuffle_seed)
    left = sum(order.size for order, weight in zip(orders, weights, strict=True) if weight > 0)
    start = 0
    while left > 0:
        which, turns = mixture(np.arange(start, start + 1024))
        start += 1024
        items = in_order(which, turns, orders)
        for number, turn, item in zip(which.tolist(), turns.tolist(), items.tolist(), strict=True):
            if turn < orders[number].size:
                left -= 1
                yield number, item
