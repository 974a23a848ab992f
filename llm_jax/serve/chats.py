"""Which layout a chat gets: the one the model was trained on, or the tokenizer's own.

A model that has neither would make nonsense of any layout, so chats are refused with a message, unless the
server was told to use "plain":

    User: text

    Assistant: answer

where a new "User:" ends an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Tokenizer
from llm_jax.objectives import dpo, sft
from llm_jax.objectives.chat import ASSISTANT, Messages, Part, Template, chat_template, tokens_of

ChatLayout = Literal["auto", "built_in", "tokenizer", "plain", "none"]
_PLAIN_END = "\n\nUser:"
_PROBE = ({"role": "user", "content": "x"}, {"role": ASSISTANT, "content": "y"})


class Chats:
    """Chats as prompts.

    stop_tokens: what ends an answer, beside eos. stops: texts that do.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self._template, self._tokenizer, self.stops = template, tokenizer, stops
        self.stop_tokens = frozenset(
            part.content
            for part in template.parts(_PROBE)
            if part.is_answer and isinstance(part.content, int)
        )

    def prompt(self, messages: Messages) -> list[int]:
        """The ids of a chat whose next words are the assistant's.

        Raises:
          ValueError: roles that the template has no place for.
        """
        parts = self._template.prompt(messages)
        return tokens_of([parts], self._tokenizer)[0].ids


def make_chats(layout: ChatLayout, tokenizer: Tokenizer, objective: object | None) -> Chats | None:
    """None where chats are refused.

    Args:
      objective: the Config that the model was trained by, if that is known.

    Raises:
      ConfigError: a layout that the tokenizer has no tokens or no template for.
    """
    if layout == "none":
        return None
    if layout == "plain":
        return Chats(Plain(tokenizer), tokenizer, (_PLAIN_END,))
    if layout != "auto":
        return Chats(chat_template(layout, tokenizer), tokenizer)
    if isinstance(objective, sft.Config | dpo.Config):
        try:
            return Chats(chat_template(objective.chat_template, tokenizer), tokenizer)
        except ConfigError:
            return None  # pairs of plain texts can be learned from without a template
    if getattr(tokenizer, "chat_template", None) is not None:  # of tokenizer.json alone
        return Chats(chat_template("tokenizer", tokenizer), tokenizer)
    return None


class Plain:
    """The layout "plain", above; needs no special tokens."""

    _NAMES: Mapping[str, str] = {"system": "System", "user": "User", ASSISTANT: "Assistant"}

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def parts(self, messages: Messages) -> list[Part]:
        return [Part(self._tokenizer.bos_id, False), Part(self._text(messages), False)]

    def prompt(self, messages: Messages) -> list[Part]:
        text = self._text([*messages, {"role": ASSISTANT, "content": ""}])
        return [Part(self._tokenizer.bos_id, False), Part(text.rstrip(" "), False)]

    def _text(self, messages: Sequence[Mapping[str, str]]) -> str:
        for message in messages:
            if message["role"] not in self._NAMES:
                raise ValueError(f"role {message['role']!a}: choices: {', '.join(self._NAMES)}")
        return "\n\n".join(f"{self._NAMES[m['role']]}: {m['content']}" for m in messages)
