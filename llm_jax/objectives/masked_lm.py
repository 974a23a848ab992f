"""Masked tokens, and whether two texts belong together: BERT, RoBERTa and ALBERT.

Of the tokens of a row, `mask_fraction` are predicted; 80 % of them are replaced by the mask token, 10 %
by a random one, 10 % stay (Devlin et al. 2018, sections 3.1 and A.1). What is masked follows from the
row's number in the run, so it is new in each epoch (dynamic masking: Liu et al. 2019, section 4.1).

`pairs` chooses the rows. "none": documents packed one after another, [CLS] text [SEP] each, which do
not see each other: rows as full as RoBERTa's, texts from one document each (its DOC-SENTENCES, section
4.2). "next_sentence", "sentence_order": one pair a row, [CLS] A [SEP] B [SEP], see `sentence_pairs`.
The tokenizer's bos is [CLS], its eos is [SEP].
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.packing import segments_and_positions
from llm_jax.core.pieces import Pieces
from llm_jax.core.randomness import RowRandom, scaled
from llm_jax.core.types import Batch, LossOutput, Model, ModelOutput, Tokenizer, Weighted
from llm_jax.nn.losses import output_loss, token_loss
from llm_jax.objectives.sentence_pairs import NUM_SPECIAL, PairMaker, lay_out

_MASKED, _RANDOM = 0.8, 0.1  # the rest stays


@dataclasses.dataclass(frozen=True)
class Config:
    """mask_fraction: share of a row's ordinary tokens that is predicted, at least one of them.

    mask_token: how the tokenizer writes it; RoBERTa: "<mask>".
    whole_word: mask all pieces of a word or none (whole words as in BERT's later code).
    pairs: what the second text of a row is; "none": rows of single texts.
    short_fraction: share of pairs that are shorter than they could be, so that the model sees these too.
    """

    name: str = "masked_lm"
    mask_fraction: float = 0.15
    mask_token: str = "[MASK]"
    whole_word: bool = False
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    short_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.mask_fraction < 1:
            raise ValueError(f"objective.mask_fraction {self.mask_fraction} must be in 0..1")
        if not 0 <= self.short_fraction <= 1:
            raise ValueError(f"objective.short_fraction {self.short_fraction} must be in 0..1")


class MaskedLm:
    examples = False
    evaluators = ("held_out",)

    def __init__(self, config: Config):
        self.config = config
        self.partner_rows = config.pairs == "next_sentence"

    def row_length(self, sequence_length: int) -> int:
        """What special tokens leave: a pair's three, or the [CLS] of a text cut by the window."""
        return sequence_length - self._num_special

    def transforms(self, tokenizer: Tokenizer) -> list:
        """Raises ConfigError where the tokenizer has no mask token."""
        return [_transform(self.config, self._num_special, tokenizer)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        num_predictions = most_predictions(sequence_length, self.config.mask_fraction)
        shapes = dict.fromkeys(
            ("tokens", "token_types", "segment_ids", "positions"), (batch_size, sequence_length)
        )
        predicted = (batch_size, num_predictions)
        shapes |= dict.fromkeys(("predict_positions", "targets", "loss_weights"), predicted)
        if self.config.pairs != "none":
            shapes |= dict.fromkeys(("labels", "label_weights"), (batch_size,))
        dtypes = {"loss_weights": jnp.float32, "label_weights": jnp.float32}
        return {
            n: jax.ShapeDtypeStruct(shape, dtypes.get(n, jnp.int32)) for n, shape in shapes.items()
        }

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """The mean over predicted tokens plus the mean over pairs (BERT, section A.2), in nats.

        Two means with two weights cannot be added up over microbatches. So a pair counts as often as
        its row has predictions: both means are then over the same weight. Where rows are equally long
        it is the plain mean over rows, which the metrics report in any case.
        """
        output = model(batch, train=train, key=key)
        targets, weights = batch["targets"], batch["loss_weights"]
        with jax.named_scope("loss"):
            sums = output_loss(model, output, targets, weights)
            loss, weight = sums.loss_sum, jnp.sum(weights)
            metrics = {
                "cross_entropy": Weighted(sums.cross_entropy_sum, weight),
                "mlm_accuracy": Weighted(sums.correct_sum, weight),
            }
            if self.config.pairs != "none":
                pair_sum, pair_metrics = _pair_loss(output, batch)
                loss, metrics = loss + pair_sum, metrics | pair_metrics
        return LossOutput.of(output, loss, weight, metrics, train=train)

    @property
    def _num_special(self) -> int:
        return 1 if self.config.pairs == "none" else NUM_SPECIAL


def most_predictions(sequence_length: int, mask_fraction: float) -> int:
    """P: predicted positions that a row has room for, a multiple of 8 where the row is that long."""
    needed = math.ceil(sequence_length * mask_fraction)
    return min(-(-needed // 8) * 8, sequence_length)


def _pair_loss(output: ModelOutput, batch: Batch) -> tuple[jax.Array, dict[str, Weighted]]:
    """(sum over pairs of nats times the row's predictions, metrics), of class_logits [B, 2]."""
    if output.class_logits is None:
        raise ValueError(
            "objective.pairs needs a model with a pair head: set model.head = 'pretraining', or "
            "objective.pairs = 'none'"
        )
    labels, weights = batch["labels"], batch["label_weights"]
    pair = token_loss(output.class_logits[:, None], labels[:, None])
    nats, correct = pair.cross_entropy[:, 0], pair.correct[:, 0]
    predictions = jnp.sum(batch["loss_weights"], axis=1)
    num_pairs = jnp.sum(weights)
    metrics = {
        "pair_loss": Weighted(jnp.sum(nats * weights), num_pairs),
        "pair_accuracy": Weighted(jnp.sum(correct * weights), num_pairs),
    }
    return jnp.sum(nats * weights * predictions), metrics


def _transform(config: Config, num_special: int, tokenizer: Tokenizer):
    """The Grain transformation of {"rows", "row_ids"}, with "partners" for next_sentence."""
    import grain  # not at the top: a training step needs no loader, and runs where Grain is not

    class MaskTokens(grain.transforms.Map):
        def __init__(self):
            self._mask = TokenMask.of(config, tokenizer)

        def map(self, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            rows, random = element["rows"], RowRandom(config.seed, element["row_ids"])
            length = rows.shape[1] + num_special
            if config.pairs == "none":
                batch = whole_rows(rows, tokenizer.bos_id, tokenizer.pad_id)
                return batch | self._mask(batch["tokens"], random)
            maker = PairMaker(
                self._mask.pieces, (tokenizer.bos_id, tokenizer.eos_id), config.short_fraction
            )
            if config.pairs == "next_sentence":
                pairs = maker.next_sentence(rows, element["partners"], random)
            else:
                pairs = maker.sentence_order(rows, random)
            ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
            batch = lay_out(pairs, *ids, length)
            batch |= self._mask(batch["tokens"], random)
            return batch | {
                "labels": pairs.labels,
                "label_weights": pairs.usable.astype(np.float32),
            }

    return MaskTokens()


def whole_rows(rows: np.ndarray, cls_id: int, pad_id: int) -> dict[str, np.ndarray]:
    """Packed rows with a [CLS] before a text that was cut by the window; the others have theirs.

    Args:
      rows: [B, T - 1] int32, -1 is padding.

    Returns:
      tokens, token_types, segment_ids, positions: [B, T] int32, a segment for each document.
    """
    tokens = np.empty((rows.shape[0], rows.shape[1] + 1), np.int32)
    tokens[:, 0] = np.where(rows[:, 0] < 0, -1, cls_id)
    tokens[:, 1:] = rows
    starts = rows[:, 0] == cls_id
    tokens[starts, :-1] = rows[starts]
    tokens[starts, -1] = -1
    segment_ids, positions = segments_and_positions(tokens, cls_id)
    return {
        "tokens": np.where(tokens < 0, np.int32(pad_id), tokens),
        "token_types": np.zeros_like(tokens),
        "segment_ids": segment_ids,
        "positions": positions,
    }


@dataclasses.dataclass(frozen=True)
class TokenMask:
    """Chooses what is predicted and hides it."""

    pieces: Pieces
    mask_id: int
    mask_fraction: float
    whole_word: bool

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "TokenMask":
        mask_id = tokenizer.token_id(config.mask_token)
        if mask_id is None:
            raise ConfigError(
                f"objective.mask_token {config.mask_token!r} is no special token of this tokenizer: "
                f"set data.tokenizer.extra_tokens = ({config.mask_token!r},) or name another"
            )
        return cls(Pieces.of(tokenizer), mask_id, config.mask_fraction, config.whole_word)

    def __call__(self, tokens: np.ndarray, random: RowRandom) -> dict[str, np.ndarray]:
        """Masks tokens [B, T] int32, special ones and padding never.

        Returns:
          tokens: [B, T] int32; predict_positions, targets: [B, P] int32, in the order of the row, 0
          where a row has no more; loss_weights: [B, P] float32.
        """
        length = tokens.shape[1]
        width = most_predictions(length, self.mask_fraction)
        maskable = self.pieces.are_ordinary(tokens)
        counts = maskable.sum(axis=1)
        sizes = np.minimum(np.maximum(np.rint(self.mask_fraction * counts), 1), counts)
        sizes = sizes.astype(np.int64)
        if self.whole_word:
            continues = self.pieces.continue_words(tokens) & maskable
            positions = choose_words(maskable, continues, sizes, width, random)
        else:
            positions = random.subset("predict", maskable, sizes, width)
        chosen = positions < length
        positions = np.where(chosen, positions, 0)
        places = positions + np.arange(len(tokens))[:, None] * length
        targets = tokens.ravel().take(places)
        hidden = tokens.ravel().copy()
        hidden[places[chosen]] = self._replaced(targets, random)[chosen]
        return {
            "tokens": hidden.reshape(tokens.shape),
            "predict_positions": positions.astype(np.int32),
            "targets": targets * chosen,
            "loss_weights": chosen.astype(np.float32),
        }

    def _replaced(self, targets: np.ndarray, random: RowRandom) -> np.ndarray:
        """What stands in the place of targets [B, P]."""
        ordinary = self.pieces.ordinary_ids
        fate = random.bits("fate", targets.shape[1])
        other = ordinary[scaled(random.bits("random token", targets.shape[1]), len(ordinary))]
        kept = np.where(fate < (_MASKED + _RANDOM) * 2**32, other, targets)
        return np.where(fate < _MASKED * 2**32, np.int32(self.mask_id), kept)


def choose_words(
    maskable: np.ndarray,
    continues: np.ndarray,
    sizes: np.ndarray,
    width: int,
    random: RowRandom,
) -> np.ndarray:
    """Whole words in random order, each taken if it still fits, until `sizes` tokens are chosen.

    Args:
      maskable, continues: [B, T] bool, ordinary tokens and those of them that are not the first of
        their word.
      sizes: [B] int, how many tokens to choose: fewer where no more words fit.

    Returns:
      [B, width] int64 columns in ascending order; T after the last one.
    """
    batch, length = maskable.shape
    starts = maskable & ~continues
    places = np.flatnonzero(starts)
    num_tokens = np.cumsum(maskable, dtype=np.int64)
    lengths = np.zeros(batch * length + 1, np.int64)
    lengths[places] = np.diff(num_tokens[places], append=num_tokens[-1] + 1)
    order = random.order("predict", starts, length)
    order += np.arange(batch)[:, None] * length
    order[np.arange(length) >= starts.sum(axis=1)[:, None]] = batch * length  # of no word
    word_lengths = lengths[order]
    taken = _greedy(word_lengths, sizes) & (word_lengths > 0)
    word_taken = np.zeros(batch * length + 1, bool)
    word_taken[order[taken]] = True
    # A maskable token belongs to the last word that started before it.
    number = np.cumsum(starts) - 1
    is_chosen = (
        maskable & word_taken[places[number]].reshape(batch, length) if len(places) else starts
    )
    columns = np.nonzero(is_chosen)[1]
    counts = is_chosen.sum(axis=1)
    chosen = np.full((batch, width), length, np.int64)
    chosen[np.arange(width) < counts[:, None]] = columns
    return chosen


def _greedy(lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[B, W] bool: each word that fits beside those taken before it, from left to right."""
    left = sizes[:, None] - np.cumsum(lengths, axis=1)
    taken = np.minimum.accumulate(left >= 0, axis=1)
    room = sizes - (lengths * taken).sum(axis=1)
    columns = np.arange(lengths.shape[1])
    next_column = taken.sum(axis=1)
    while True:
        fits = (lengths > 0) & (lengths <= room[:, None]) & (columns >= next_column[:, None])
        found = fits.argmax(axis=1)
        rows = np.flatnonzero(fits[np.arange(len(found)), found])
        if not len(rows):
            return taken
        taken[rows, found[rows]] = True
        room[rows] -= lengths[rows, found[rows]]
        next_column[rows] = found[rows] + 1


def make(config: Config) -> MaskedLm:
    return MaskedLm(config)
