"""One text to another with an encoder-decoder: translation, and any task written as text (T5).

The encoder reads `prefix source [eos]`; the decoder writes `target [eos]` and starts from pad, as T5 and
Marian do (Raffel et al. 2019, section 2.4). Several tasks train together as sources of data with weights:
`data.sources = ({..., "weight": 2.0}, {..., "weight": 1.0})`, told apart by a prefix from a record's field.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Batch, LossOutput, Model, ModelOutput, Tokenizer, Weighted
from llm_jax.nn.head import head_logits
from llm_jax.nn.losses import output_loss, token_loss
from llm_jax.objectives.records import (
    FieldTemplate,
    Limit,
    Records,
    batch_transform,
    check_rates,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """source, target: fields of a record.

    prefix: stands before the source; `{field}` in it is a record's own, as in "translate to {language}: ".
    target_length: decoder positions, [eos] included; None: data.sequence_length, as the encoder.
    examples_per_row: records that share a row without seeing each other; all must fit.
    truncate: cut a source that is too long, instead of an error. A target never is cut.
    label_smoothing: share of a target's probability given to all ids alike (Vaswani et al. 2017: 0.1).
    z_loss: weight of log(Z)^2. Both count in training only.
    """

    name: str = "seq2seq"
    source: str = "source"
    target: str = "target"
    prefix: str = ""
    target_length: int | None = None
    examples_per_row: int = 1
    truncate: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        check_rates(self)
        if self.target_length is not None and self.target_length < 1:
            raise ValueError(f"objective.target_length {self.target_length} must be at least 1")
        if self.truncate and self.examples_per_row > 1:
            raise ValueError(
                f"objective.truncate with examples_per_row {self.examples_per_row}: which of a row's "
                "sources to cut is not defined; set one of the two"
            )
        _ = self.template

    @property
    def template(self) -> FieldTemplate:
        return FieldTemplate(self.prefix, "objective.prefix")


class Seq2Seq:
    examples = True
    evaluators = ("held_out", "exact_match")

    def __init__(self, config: Config):
        self.config = config
        self.examples_per_row = config.examples_per_row

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        make = functools.partial(make_batch, self.config, tokenizer, sequence_length)
        return [batch_transform(make)]

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """(what the encoder reads, what the decoder should write) of each record, as text."""
        records = Records(examples, np.arange(len(examples)))
        return list(zip(*_sides(self.config, records), strict=True))

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        encoder = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)
        names = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")
        decoder = (batch_size, self.config.target_length or sequence_length)
        spec = dict.fromkeys(names, encoder)
        for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights"):
            dtype = jnp.float32 if name == "loss_weights" else jnp.int32
            spec[name] = jax.ShapeDtypeStruct(decoder, dtype)
        return spec

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """Cross entropy in nats, summed over the targets.

        Evaluation also reports sequence_accuracy: the share of examples with all targets right, each
        given the true ones before it. It takes the logits of the whole batch.
        """
        config = self.config
        output = model(batch, train=train, key=key)
        targets, weights = batch["targets"], batch["loss_weights"]
        extra = (config.z_loss, config.label_smoothing) if train else (0.0, 0.0)
        with jax.named_scope("loss"):
            sums = output_loss(model, output, targets, weights, *extra)
        weight = jnp.sum(weights)
        metrics = {
            "cross_entropy": Weighted(sums.cross_entropy_sum, weight),
            "accuracy": Weighted(sums.correct_sum, weight),
        }
        if extra[0]:
            metrics["z_loss"] = Weighted(sums.z_loss_sum, weight)
        if not train:
            metrics["sequence_accuracy"] = self._whole_examples(model, output, batch)
        return LossOutput.of(output, sums.loss_sum, weight, metrics, train=train)

    def _whole_examples(self, model: Model, output: ModelOutput, batch: Batch) -> Weighted:
        """How many examples have every target right, of how many."""
        logits, weights = output.logits, batch["loss_weights"]
        if logits is None:
            logits = head_logits(model.precision, output.hidden, output.head)
        correct = token_loss(logits, batch["targets"]).correct
        numbers = jnp.arange(1, self.examples_per_row + 1)
        of_example = (batch["segment_ids"][..., None] == numbers).astype(jnp.float32)  # [B, T, K]
        count = lambda x: jnp.einsum("bt,btk->bk", x, of_example)  # noqa: E731
        targets, wrong = count(weights), count(weights * (1 - correct))
        is_whole = (targets > 0) & (wrong == 0)
        total = lambda x: jnp.sum(x, dtype=jnp.float32)  # noqa: E731
        return Weighted(total(is_whole), total(targets > 0))


def make_batch(
    config: Config, tokenizer: Tokenizer, length: int, records: Records
) -> dict[str, np.ndarray]:
    """The batch of N records: B = N / examples_per_row rows.

    Raises:
      ConfigError: a field that is not there, or a text that is too long; names the record.
    """
    real, eos = records.real, tokenizer.eos_id
    sources, targets = _sides(config, records)
    # One call, so that a library that works on all cores does.
    ids = tokenizer.encode_batch(sources + targets)
    ended = [[*x, eos] if r else [] for x, r in zip(ids, real * 2, strict=True)]
    sources, targets = ended[: len(real)], ended[len(real) :]
    if config.truncate:
        sources = [x if len(x) <= length else [*x[: length - 1], eos] for x in sources]
    encoder = records.layout(
        [len(x) for x in sources], Limit("the source", length), config.examples_per_row
    )
    setting = "data.sequence_length" if config.target_length is None else "objective.target_length"
    limit = Limit("the target", config.target_length or length, setting, "")
    decoder = records.layout([len(x) for x in targets], limit, config.examples_per_row)
    shifted = [[tokenizer.pad_id, *x[:-1]] if x else [] for x in targets]
    return {
        "encoder_tokens": encoder.filled(sources, tokenizer.pad_id),
        "encoder_segment_ids": encoder.segment_ids,
        "encoder_positions": encoder.positions,
        "tokens": decoder.filled(shifted, tokenizer.pad_id),
        "targets": decoder.filled(targets, tokenizer.pad_id),
        "segment_ids": decoder.segment_ids,
        "positions": decoder.positions,
        "loss_weights": (decoder.segment_ids > 0).astype(np.float32),
    }


def _sides(config: Config, records: Records) -> tuple[list[str], list[str]]:
    template = config.template
    prefixes = [template(records, i) if r else "" for i, r in enumerate(records.real)]
    sources = [a + b for a, b in zip(prefixes, records.texts(config.source), strict=True)]
    return sources, records.texts(config.target)


def make(config: Config) -> Seq2Seq:
    return Seq2Seq(config)
