"""Supervised fine-tuning on chats: next-token prediction of what the assistant says, and of nothing else.

A record has "messages", a list of {"role", "content"}. How a chat becomes tokens, and which of them are
answers, is in chat.py. A prompt for generation is `prompt_ids`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.core.types import Tokenizer
from llm_jax.objectives.causal_lm import CausalLm
from llm_jax.objectives.chat import (
    ASSISTANT,
    Messages,
    Template,
    TemplateName,
    Tokens,
    chat_template,
    check_messages,
    tokens_of,
)
from llm_jax.objectives.records import Limit, Records, batch_transform, check_rates


@dataclasses.dataclass(frozen=True)
class Config:
    """messages: field of a record.

    chat_template: "built_in", or the "tokenizer"'s own.
    examples_per_row: chats that share a row without seeing each other; all must fit.
    truncate: cut a chat that is too long at its end, instead of an error; with it may go answers.
    z_loss: weight of log(Z)^2, in training only.
    """

    name: str = "sft"
    messages: str = "messages"
    chat_template: TemplateName = "built_in"
    examples_per_row: int = 1
    truncate: bool = False
    z_loss: float = 0.0

    def __post_init__(self):
        check_rates(self)
        if self.truncate and self.examples_per_row > 1:
            raise ValueError(
                f"objective.truncate with examples_per_row {self.examples_per_row}: which of a row's "
                "chats to cut is not defined; set one of the two"
            )


class Sft(CausalLm):
    """Batches and loss are those of next-token prediction."""

    config: Config
    examples = True
    evaluators = ("held_out",)

    def __init__(self, config: Config):
        super().__init__(config)
        self.examples_per_row = config.examples_per_row

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        """Raises ConfigError where the tokenizer lacks the chat template's special tokens."""
        template = chat_template(self.config.chat_template, tokenizer)
        make = functools.partial(make_batch, self.config, tokenizer, template, sequence_length)
        return [batch_transform(make)]


def render(messages: Messages, tokenizer: Tokenizer, template: TemplateName = "built_in") -> Tokens:
    """A chat's ids and mask.

    Raises:
      ValueError: what is no list of messages, or a role that the template does not know.
    """
    check_messages(messages)
    parts = chat_template(template, tokenizer).parts(messages)
    return tokens_of([parts], tokenizer)[0]


def prompt_ids(
    messages: Messages, tokenizer: Tokenizer, template: TemplateName = "built_in"
) -> list[int]:
    """What a model is given to write the next answer; `render` begins with it."""
    check_messages(messages)
    parts = chat_template(template, tokenizer).prompt(messages)
    return tokens_of([parts], tokenizer)[0].ids


def make_batch(
    config: Config, tokenizer: Tokenizer, template: Template, length: int, records: Records
) -> dict[str, np.ndarray]:
    """The batch of N chats: B = N / examples_per_row rows.

    Raises:
      ConfigError: a chat without an answer, a message of another form, or too long a chat; names the
        record.
    """
    parts = [
        _parts(records, i, records.value(i, config.messages), template) if real else []
        for i, real in enumerate(records.real)
    ]
    chats = tokens_of(parts, tokenizer)
    if config.truncate:
        chats = [Tokens(chat.ids[: length + 1], chat.mask[: length + 1]) for chat in chats]
    return next_token_rows(records, chats, length, tokenizer.pad_id, config.examples_per_row)


def next_token_rows(
    records: Records, chats: Sequence[Tokens], length: int, pad_id: int, per_row: int = 1
) -> dict[str, np.ndarray]:
    """The batch in which each token that the mask names is a target.

    Returns:
      tokens, targets, segment_ids, positions: [B, T] int32; loss_weights: [B, T] float32.

    Raises:
      ConfigError: chats of more than T + 1 tokens.
    """
    sizes = [max(len(chat.ids) - 1, 0) for chat in chats]
    layout = records.layout(sizes, Limit("its text, but for the last token,", length), per_row)
    return {
        "tokens": layout.filled([chat.ids[:-1] for chat in chats], pad_id),
        "targets": layout.filled([chat.ids[1:] for chat in chats], pad_id),
        "loss_weights": layout.filled([chat.mask[1:] for chat in chats], 0, np.float32),
        "segment_ids": layout.segment_ids,
        "positions": layout.positions,
    }


def _parts(records: Records, number: int, messages: Any, template: Template) -> list:
    try:
        check_messages(messages)
        if not any(m["role"] == ASSISTANT and m["content"] for m in messages):
            raise ValueError("a chat with no answer: expected a message with role 'assistant'")
        return template.parts(messages)
    except ValueError as error:
        raise records.error(number, str(error)) from None


def make(config: Config) -> Sft:
    return Sft(config)
