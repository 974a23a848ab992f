"""What requests may hold. Anything else is refused: a field that had no effect would be a lie.

OpenAI's fields have OpenAI's names and limits, where this engine can do as they say. Fields that it cannot
serve are here as far as their value changes nothing, since clients send them.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llm_jax.generate.sampler import SamplingConfig
from llm_jax.serve.errors import ApiError

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_BIASES, MAX_FIELDS = 1024, 64
MAX_PROMPTS = 4096
MAX_LOGPROBS = 20


def _encodable(text: str) -> str:
    """JSON can write half of a character that needs two, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate at character {error.start}") from None
    return text


def _bounded(value: Any, most: int, what: str) -> Any:
    """Before each entry is looked at, and complained of: a million complaints take seconds to make."""
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"{len(value)} {what}: at most {most} are taken")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, Field(max_length=1024)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(lambda value: _bounded(value, MAX_BIASES, "biases")),
]
Nothing = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    """No field is guessed: "1" is no number, true is none, and NaN is none either."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _bounded(value, MAX_FIELDS, "fields")


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Sampling(Strict):
    """How tokens are drawn; the last three are no fields of OpenAI's."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    presence_penalty: Nothing | None = None
    frequency_penalty: Nothing | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream: true", param="stream_options")

    def config(
        self, max_tokens: int, vocab_size: int, stops: tuple[str, ...] | None = None
    ) -> SamplingConfig:
        """Raises ApiError for a logit_bias of ids that there are not.

        stops: in place of the request's own.
        """
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        wrong = [token for token in biases if token >= vocab_size]
        if wrong:
            message = (
                f"logit_bias: token id {wrong[0]}: ids of this model lie in 0..{vocab_size - 1}"
            )
            raise ApiError(400, message, param="logit_bias")
        return SamplingConfig(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=None if self.top_k is None else min(self.top_k, vocab_size),
            top_p=self.top_p,
            min_p=self.min_p or None,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=biases,
            seed=secrets.randbits(32) if self.seed is None else self.seed % 2**32,
            max_tokens=max_tokens,
            stops=self.stops if stops is None else stops,
        )


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: Literal[""] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=4096)]

    def plain(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        # OpenAI's newer name of the same role.
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None


class PageRequest(Strict):
    """POST /api/generate: a text to go on from, as text, as ids, or as a question in a chat."""

    text: Text | None = None
    question: Text | None = None
    tokens: Annotated[Ids, Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 100
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


class TokensRequest(Strict):
    """POST /api/score and /api/attention: of a text's last token."""

    tokens: Annotated[Ids, Field(min_length=1)]


class LensRequest(TokensRequest):
    """POST /api/lens. target: a token whose chances after `tokens` are asked for."""

    target: Id
