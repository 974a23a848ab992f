"""Extractive question answering with an encoder: where in a text the answer starts and ends (SQuAD).

A row is [CLS] question [SEP] context [SEP]; the two logits of each token are softmaxed over the tokens of the
context (Devlin et al. 2018, sections 4.2 and 4.3). [CLS] is the answer to a question that has none. Records
are SQuAD's, answers start at a character; the first of several answers is the target.

Of a context that is too long a window is shown that holds the whole answer, anywhere in it: which one follows
from the row's number in the run, so it is new in each epoch. The figures on long contexts are hence of
finding the answer in the right window, not of finding the window.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.offsets import Offsets
from llm_jax.core.randomness import RowRandom
from llm_jax.core.types import Batch, LossOutput, Model, Tokenizer, Weighted
from llm_jax.nn.losses import token_loss
from llm_jax.objectives.encoder_rows import (
    NO_ROW,
    EncoderRow,
    PairStyle,
    encoder_batch,
    encoder_spec,
    num_special,
)
from llm_jax.objectives.records import Limit, Records, batch_transform

_NEVER = -1e30  # a logit of what is no answer; finite, so that a row of padding has a softmax


@dataclasses.dataclass(frozen=True)
class Config:
    """question, context, answers: fields of a record.

    answers: {"text": [...], "answer_start": [...]}, or a list of {"text", "answer_start"}; empty: there is
    no answer. seed: of the windows.
    """

    name: str = "answer"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    pair_style: PairStyle = "bert"
    seed: int = 0


class Answer:
    examples = True
    examples_per_row = 1
    evaluators = ("held_out",)

    def __init__(self, config: Config):
        self.config = config

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        maker = _Maker(self.config, tokenizer, sequence_length, Offsets.of(tokenizer))
        return [batch_transform(maker)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Beside the reserved keys: answer_start, answer_end [B] int32, the first and the last token.

        answer_places: [B, T] int32, 1 for [CLS] and the context. label_weights: [B] float32.
        """
        column = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        places = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)
        return encoder_spec(batch_size, sequence_length) | {
            "answer_start": column,
            "answer_end": column,
            "answer_places": places,
            "label_weights": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        }

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """The mean of the cross entropies of start and end, in nats, summed over the rows.

        exact_span: the share of rows whose largest logits are at the very start and end.

        Raises:
          ValueError: a model without two logits for each token.
        """
        output = model(batch, train=train, key=key)
        if output.logits is None or output.logits.shape[-1] != 2:
            raise ValueError(
                "objective answer needs two logits for each token: set model.head = "
                "'question_answering'"
            )
        weights = batch["label_weights"]
        spans = jnp.stack([batch["answer_start"], batch["answer_end"]], axis=1)
        with jax.named_scope("loss"):
            logits = jnp.where(batch["answer_places"][..., None] > 0, output.logits, _NEVER)
            each = token_loss(logits.swapaxes(1, 2), spans)  # [B, 2]
            loss = jnp.sum(jnp.mean(each.cross_entropy, axis=1) * weights)
        weight = jnp.sum(weights)
        start, end = (each.correct * weights[:, None]).T
        metrics = {
            "exact_span": Weighted(jnp.sum(start * end), weight),
            "start_accuracy": Weighted(jnp.sum(start), weight),
            "end_accuracy": Weighted(jnp.sum(end), weight),
        }
        return LossOutput.of(output, loss, weight, metrics, train=train)


@dataclasses.dataclass(frozen=True)
class _Maker:
    """The batch of B records.

    Raises:
      ConfigError: an answer that is not in its context, or no room for question and answer; names the
        record.
    """

    config: Config
    tokenizer: Tokenizer
    length: int
    offsets: Offsets

    def __call__(self, records: Records) -> dict[str, np.ndarray]:
        config, real = self.config, records.real
        questions, contexts = records.texts(config.question), records.texts(config.context)
        ids = self.tokenizer.encode_batch(questions + contexts)
        questions, context_ids = ids[: len(real)], ids[len(real) :]
        spans = [
            self._span(records, i, contexts[i], context_ids[i]) if r else None
            for i, r in enumerate(real)
        ]
        windows = self._windows(records, questions, context_ids, spans)
        rows, starts, ends = [], [], []
        for i, (first, stop) in enumerate(windows):
            row, span = NO_ROW, None
            if real[i]:
                window = context_ids[i][first:stop]
                row = EncoderRow.of_pair(questions[i], window, self.tokenizer, config.pair_style)
                span = spans[i]
            rows.append(row)
            shift = 0 if span is None else row.second - first
            start, last = span or (0, 0)
            starts.append(start + shift)
            ends.append(last + shift)
        layout = records.layout([len(row.tokens) for row in rows], Limit("the row", self.length))
        places = [_places(row) for row in rows]
        return encoder_batch(rows, layout, self.tokenizer.pad_id) | {
            "answer_start": np.array(starts, np.int32),
            "answer_end": np.array(ends, np.int32),
            "answer_places": layout.filled(places, 0),
            "label_weights": np.array(real, np.float32),
        }

    def _span(
        self, records: Records, number: int, context: str, ids: list[int]
    ) -> tuple[int, int] | None:
        """First and last token of the answer in the context, or None where there is no answer."""
        answer = _first_answer(records, number, self.config.answers)
        if answer is None:
            return None
        text, start = answer
        if context[start : start + len(text)] != text or not text.strip():
            raise records.error(
                number,
                f"the answer {text!r} is not at character {start} of {self.config.context!r}",
            )
        start += len(text) - len(text.lstrip())
        end = start + len(text.strip())
        firsts, stops = self.offsets(context, ids).T
        inside = np.flatnonzero((stops > start) & (firsts < end))
        if not len(inside):
            raise records.error(number, f"the tokenizer makes no token of the answer {text!r}")
        return int(inside[0]), int(inside[-1])

    def _windows(
        self, records: Records, questions: list, contexts: list, spans: list
    ) -> list[tuple[int, int]]:
        """The tokens of each context that are shown."""
        earliest, choices, rooms = [], [], []
        for i, (question, context, span) in enumerate(zip(questions, contexts, spans, strict=True)):
            room = self.length - num_special(self.config.pair_style) - len(question)
            first, last = (0, 0) if span is None else span
            if records.real[i] and room < last + 1 - first:
                raise records.error(
                    i,
                    f"a question of {len(question)} tokens and an answer of {last + 1 - first} leave no "
                    f"room in data.sequence_length = {self.length}",
                )
            latest = max(len(context) - room, 0)
            if span is not None:
                latest = min(latest, first)
            earliest.append(0 if span is None else max(last + 1 - room, 0))
            choices.append(latest - earliest[-1] + 1)
            rooms.append(room)
        random = RowRandom(self.config.seed, records.row_ids)
        firsts = np.array(earliest) + random.below("window", np.array(choices))
        return [(int(f), int(f) + room) for f, room in zip(firsts, rooms, strict=True)]


def _first_answer(records: Records, number: int, field: str) -> tuple[str, int] | None:
    """(text, first character) of the first answer."""
    answers = records.value(number, field)
    if isinstance(answers, list) and all(isinstance(a, dict) for a in answers):
        answers = {key: [a.get(key) for a in answers] for key in ("text", "answer_start")}
    lists = (
        [answers.get(key) for key in ("text", "answer_start")] if isinstance(answers, dict) else []
    )
    if len(lists) != 2 or not all(isinstance(x, list) for x in lists):
        raise records.error(number, f"{field!r}: expected lists 'text' and 'answer_start'")
    texts, starts = lists
    if not texts and not starts:
        return None
    if not (texts and starts and isinstance(texts[0], str) and isinstance(starts[0], int)):
        raise records.error(number, f"{field!r}: expected texts and their first characters")
    return texts[0], starts[0]


def _places(row: EncoderRow) -> list[int]:
    """1 for [CLS] and the context, without its [SEP]."""
    if row.second is None:
        return []
    num_context = len(row.tokens) - row.second - 1
    return [1, *[0] * (row.second - 1), *[1] * num_context, 0]


def make(config: Config) -> Answer:
    return Answer(config)
