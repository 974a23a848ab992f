"""The class of a text, or of a pair of texts, with an encoder (Devlin et al. 2018, section 4.1).

Fine-tuning of `class_logits`, which BERT makes of its first token (model.head = "sequence_classification").
A decoder or T5 answers in words instead: `seq2seq` or `sft` with the label as the target.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Batch, LossOutput, Model, Tokenizer, Weighted
from llm_jax.nn.losses import logits_loss
from llm_jax.objectives.encoder_rows import (
    NO_ROW,
    EncoderRow,
    PairStyle,
    encoder_batch,
    encoder_spec,
    longest_first,
    num_special,
)
from llm_jax.objectives.records import (
    Limit,
    Records,
    batch_transform,
    check_labels,
    check_rates,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """labels: the classes, in the order of the logits; see `Records.label` for labels that are numbers.

    text, text_pair, label: fields of a record; text_pair None: single texts.
    truncate: cut texts that are too long at their ends, of a pair the longer one first, instead of an error.
    label_smoothing: share of a label's probability given to all classes alike, in training only.
    """

    labels: tuple[str, ...]
    name: str = "classify"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    pair_style: PairStyle = "bert"
    truncate: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_labels(self.labels)
        check_rates(self)

    @property
    def num_special(self) -> int:
        return num_special(self.pair_style if self.text_pair else None)


class Classify:
    examples = True
    examples_per_row = 1
    evaluators = ("held_out",)

    def __init__(self, config: Config):
        self.config = config

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        make = functools.partial(make_batch, self.config, tokenizer, sequence_length)
        return [batch_transform(make)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        return encoder_spec(batch_size, sequence_length) | {
            "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            "label_weights": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        }

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """Cross entropy in nats, summed over the rows.

        Raises:
          ValueError: a model without class logits, or with another number of classes.
        """
        output = model(batch, train=train, key=key)
        classes, wanted = output.class_logits, len(self.config.labels)
        if classes is None:
            raise ValueError(
                "objective classify needs class logits: set model.head = 'sequence_classification'"
            )
        if classes.shape[-1] != wanted:
            raise ValueError(
                f"the model has {classes.shape[-1]} classes, objective.labels {wanted}: set "
                f"model.num_labels = {wanted}"
            )
        smoothing = self.config.label_smoothing if train else 0.0
        weights = batch["label_weights"]
        with jax.named_scope("loss"):
            sums = logits_loss(classes, batch["labels"], weights, 0.0, smoothing)
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
      ConfigError: a label outside the set, a missing field, or too long a text; names the record.
    """
    texts = records.texts(config.text)
    pairs = records.texts(config.text_pair) if config.text_pair else []
    labels = [
        records.label(i, records.value(i, config.label), config.labels) if real else 0
        for i, real in enumerate(records.real)
    ]
    ids = tokenizer.encode_batch(texts + pairs)
    firsts, seconds = ids[: len(texts)], ids[len(texts) :]
    rows = []
    for i, real in enumerate(records.real):
        if not real:
            rows.append(NO_ROW)
            continue
        first, second = firsts[i], seconds[i] if pairs else []
        if config.truncate:
            first, second = longest_first(first, second, length - config.num_special)
        rows.append(
            EncoderRow.of_pair(first, second, tokenizer, config.pair_style)
            if pairs
            else EncoderRow.of_text(first, tokenizer)
        )
    what = "the pair, special tokens included," if pairs else "the text, special tokens included,"
    layout = records.layout([len(row.tokens) for row in rows], Limit(what, length))
    return encoder_batch(rows, layout, tokenizer.pad_id) | {
        "labels": np.array(labels, np.int32),
        "label_weights": np.array(records.real, np.float32),
    }


def make(config: Config) -> Classify:
    return Classify(config)
