r"""Chats as tokens: which of them the assistant wrote follows from how they are put together.

"built_in": `[bos] <|system|> text <|end|> <|user|> text <|end|> <|assistant|> answer <|end|> ... [eos]`, where
the marks are special tokens that nobody can write in a message. Any role has a mark that the tokenizer
has a token `<|role|>` for.

"tokenizer": the Jinja template that came with the tokenizer, rendered as Hugging Face does. What an answer adds
to the chat before it is the difference of two renderings, up to its last special token. Special tokens in a
message stay text here, too.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Tokenizer

ASSISTANT = "assistant"
TemplateName = Literal["built_in", "tokenizer"]
Messages = Sequence[Mapping[str, str]]
_END = "<|end|>"


class Part(NamedTuple):
    """content: a text, or the id of a special token. is_answer: the assistant wrote it."""

    content: str | int
    is_answer: bool


class Tokens(NamedTuple):
    """ids of a chat; mask: True where the assistant wrote it, its end mark included."""

    ids: list[int]
    mask: list[bool]


class Template(Protocol):
    def parts(self, messages: Messages) -> list[Part]:
        """Of a whole chat.

        Raises:
          ValueError: a role or an order of roles that the template has no place for.
        """

    def prompt(self, messages: Messages) -> list[Part]:
        """Of a chat whose next words are the assistant's."""


def chat_template(name: TemplateName, tokenizer: Tokenizer) -> Template:
    """Raises ConfigError where the tokenizer lacks the special tokens, or a template."""
    if name == "built_in":
        return BuiltIn(tokenizer)
    text = getattr(tokenizer, "chat_template", None)  # of tokenizer.json alone
    if text is None:
        raise ConfigError(
            "objective.chat_template = 'tokenizer': this tokenizer brings none; choices: built_in"
        )
    return Jinja(text, tokenizer)


def tokens_of(chats: Sequence[Sequence[Part]], tokenizer: Tokenizer) -> list[Tokens]:
    """All texts of all chats in one call of the tokenizer."""
    texts = [part.content for parts in chats for part in parts if isinstance(part.content, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    made = []
    for parts in chats:
        tokens = Tokens([], [])
        for content, is_answer in parts:
            ids = next(encoded) if isinstance(content, str) else [content]
            tokens.ids.extend(ids)
            tokens.mask.extend([is_answer] * len(ids))
        made.append(tokens)
    return made


def check_messages(messages: Any) -> None:
    """Raises ValueError for anything but a list of {"role", "content"} with texts in both."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("expected a list of messages")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise ValueError(f"message {number + 1}: expected a text under {key!r}")


class BuiltIn:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        marks = (_mark("system"), _mark("user"), _mark(ASSISTANT), _END)
        missing = [mark for mark in marks if tokenizer.token_id(mark) is None]
        if missing:
            raise ConfigError(
                f"the chat template needs the special token {missing[0]}: set "
                f"data.tokenizer.extra_tokens = {marks}, or objective.chat_template = 'tokenizer'"
            )
        self._end = tokenizer.token_id(_END)

    def parts(self, messages: Messages) -> list[Part]:
        parts = [Part(self._tokenizer.bos_id, False)]
        for message in messages:
            is_answer = message["role"] == ASSISTANT
            parts += [
                Part(self._role(message["role"]), False),
                Part(message["content"], is_answer),
                Part(self._end, is_answer),
            ]
        # After the last answer a model that completes texts may stop.
        ends = [Part(self._tokenizer.eos_id, True)] if messages[-1]["role"] == ASSISTANT else []
        return parts + ends

    def prompt(self, messages: Messages) -> list[Part]:
        parts = self.parts(messages)
        if messages[-1]["role"] == ASSISTANT:
            parts = parts[:-1]
        return [*parts, Part(self._role(ASSISTANT), False)]

    def _role(self, role: str) -> int:
        found = self._tokenizer.token_id(_mark(role))
        if found is None:
            raise ValueError(
                f"role {role!r}: the tokenizer has no special token {_mark(role)}; choices: system, "
                "user, assistant"
            )
        return found


def _mark(role: str) -> str:
    return f"<|{role}|>"


class Jinja:
    """Unusual: without the time of day, so that a chat is the same tokens tomorrow."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self._template = _compiled(text)
        self._names = {
            "bos_token": tokenizer.id_to_piece(tokenizer.bos_id),
            "eos_token": tokenizer.id_to_piece(tokenizer.eos_id),
        }
        pieces = ((tokenizer.id_to_piece(i), i) for i in range(tokenizer.vocab_size))
        self._special = {
            piece: i
            for piece, i in pieces
            if tokenizer.token_id(piece) == i and not tokenizer.decode_bytes([i])
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def parts(self, messages: Messages) -> list[Part]:
        messages, mark = self._protected(messages)
        whole, at, parts = self._render(messages), 0, []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1])
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
                raise ValueError(
                    f"message {number + 1}: the tokenizer's chat template writes it in another way once "
                    "more follows; split the chat, or set objective.chat_template = 'built_in'"
                )
            parts += self._cut(whole[at : len(before)], mark, is_answer=False)
            parts += self._cut(whole[len(before) : len(after)], mark, is_answer=True)
            at = len(after)
        return parts + self._cut(whole[at:], mark, is_answer=False)

    def prompt(self, messages: Messages) -> list[Part]:
        messages, mark = self._protected(messages)
        text = self._render(messages, add_generation_prompt=True)
        return self._cut(text, mark, is_answer=False)

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._names
            )
        except Exception as error:  # whatever the template's expressions raise
            raise ValueError(f"the tokenizer's chat template: {_one_line(error)}") from None

    def _protected(self, messages: Messages) -> tuple[list[dict[str, str]], str]:
        """Messages with a mark inside each special token's text, which hence is none; and the mark."""
        contents = "".join(message["content"] for message in messages)
        mark = next(chr(i) for i in range(0xE000, 0xF900) if chr(i) not in contents)
        break_up = lambda found: found[0][:1] + mark + found[0][1:]  # noqa: E731
        return [
            {**message, "content": self._split.sub(break_up, message["content"])}
            for message in messages
        ], mark

    def _cut(self, text: str, mark: str, *, is_answer: bool) -> list[Part]:
        pieces = [piece for piece in self._split.split(text) if piece]
        last = max((i for i, p in enumerate(pieces) if p in self._special), default=len(pieces))
        return [
            Part(self._special.get(piece, piece.replace(mark, "")), is_answer and i <= last)
            for i, piece in enumerate(pieces)
        ]


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """As `transformers` compiles it, in a sandbox: a template is somebody else's program."""
    try:
        from jinja2 import TemplateError, ext, sandbox
    except ImportError:
        raise ConfigError('a chat template needs jinja2: pip install "llm_jax[chat]"') from None

    class Generation(ext.Extension):
        """`{% generation %}`, which marks answers in some templates; here they are known already."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.LoopControlExtension]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
