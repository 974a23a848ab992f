"""A label for each word, with an encoder: named entities, parts of speech (Devlin et al. 2018, section 5.3).

The first piece of a word carries its label, the other pieces are no targets. Words are encoded one by one, as
they stand after a space; a word of which the tokenizer makes nothing has no target.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Batch, LossOutput, Model, Tokenizer, Weighted
from llm_jax.nn.losses import logits_loss
from llm_jax.objectives.encoder_rows import NO_ROW, EncoderRow, encoder_batch, encoder_spec
from llm_jax.objectives.records import Limit, Records, batch_transform, check_labels


@dataclasses.dataclass(frozen=True)
class Config:
    """labels: the classes, in the order of the logits; see `Records.label` for labels that are numbers.

    words, word_labels: fields of a record, lists of the same length.
    truncate: cut sentences that are too long at their ends, instead of an error.
    """

    labels: tuple[str, ...]
    name: str = "tag"
    words: str = "tokens"
    word_labels: str = "labels"
    truncate: bool = False

    def __post_init__(self):
        check_labels(self.labels)


class Tag:
    examples = True
    examples_per_row = 1
    evaluators = ("held_out",)

    def __init__(self, config: Config):
        self.config = config

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        make = functools.partial(make_batch, self.config, tokenizer, sequence_length)
        return [batch_transform(make)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, sequence_length)
        return encoder_spec(batch_size, sequence_length) | {
            "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
            "loss_weights": jax.ShapeDtypeStruct(shape, jnp.float32),
        }

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """Cross entropy in nats, summed over the words.

        Raises:
          ValueError: a model with another number of classes.
        """
        output = model(batch, train=train, key=key)
        wanted = len(self.config.labels)
        classes = None if output.logits is None else output.logits.shape[-1]
        if classes != wanted:
            raise ValueError(
                f"the model has {classes or 'no'} classes for each token, objective.labels {wanted}: "
                f"set model.head = 'token_classification', model.num_labels = {wanted}"
            )
        weights = batch["loss_weights"]
        with jax.named_scope("loss"):
            sums = logits_loss(output.logits, batch["targets"], weights)
        weight = jnp.sum(weights)
        metrics = {
            "cross_entropy": Weighted(sums.cross_entropy_sum, weight),
            "accuracy": Weighted(sums.correct_sum, weight),
        }
        return LossOutput.of(output, sums.loss_sum, weight, metrics, train=train)


def make_batch(
    config: Config, tokenizer: Tokenizer, length: int, records: Records
) -> dict[str, np.ndarray]:
    """The batch of B records.

    Raises:
      ConfigError: a label outside the set, lists that do not match, or too long a sentence; names the
        record.
    """
    sentences = [
        _labelled_words(config, records, i) if real else [] for i, real in enumerate(records.real)
    ]
    space = _space(tokenizer)
    pieces = iter(
        tokenizer.encode_batch(
            [space * (n > 0) + word for words in sentences for n, (word, _) in enumerate(words)]
        )
    )
    rows, targets, weights = [], [], []
    for words, real in zip(sentences, records.real, strict=True):
        ids, labels, first = [], [], []
        for _, label in words:
            word = next(pieces)
            ids += word
            labels += [label] * len(word)
            first += [1.0, *[0.0] * (len(word) - 1)][: len(word)]
        room = length - 2 if config.truncate else len(ids)
        rows.append(EncoderRow.of_text(ids[:room], tokenizer) if real else NO_ROW)
        targets.append([0, *labels[:room], 0] if real else [])
        weights.append([0.0, *first[:room], 0.0] if real else [])
    limit = Limit("the sentence, special tokens included,", length)
    layout = records.layout([len(row.tokens) for row in rows], limit)
    weights = layout.filled(weights, 0, np.float32)
    targets = layout.filled(targets, 0) * (weights > 0)
    batch = encoder_batch(rows, layout, tokenizer.pad_id)
    return batch | {"targets": targets.astype(np.int32), "loss_weights": weights}


def _labelled_words(config: Config, records: Records, number: int) -> list[tuple[str, int]]:
    words = records.items(number, config.words)
    labels = records.items(number, config.word_labels)
    if len(words) != len(labels):
        raise records.error(
            number,
            f"{len(words)} words in {config.words!r}, {len(labels)} labels in {config.word_labels!r}",
        )
    numbers = [records.label(number, label, config.labels) for label in labels]
    return list(zip(map(str, words), numbers, strict=True))


def _space(tokenizer: Tokenizer) -> str:
    """What a word follows: nothing where the tokenizer itself puts a space before a text (Llama 2)."""
    return "" if tokenizer.decode_bytes(tokenizer.encode("a")).startswith(b" ") else " "


def make(config: Config) -> Tag:
    return Tag(config)
