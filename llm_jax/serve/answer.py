"""An answer of one or more choices, told whole or as they grow: what /v1/completions and /v1/chat/completions share."""

import abc
import json
import secrets
import time
from collections.abc import AsyncIterator
from itertools import groupby
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar

from fastapi import Response

from llm_jax.generate.events import TokenEvent
from llm_jax.serve.errors import ApiError
from llm_jax.serve.replies import Events, Whole
from llm_jax.serve.requests import ChatRequest, CompletionRequest
from llm_jax.serve.service import Service
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Job, Reply

_DONE = b"data: [DONE]\n\n"
_FINISH = {"eos": "stop", "stop": "stop", "max_tokens": "length", "length_limit": "length"}


class Choice(abc.ABC):
    """One text as it grows: what was not told yet."""

    def __init__(self, index: int, vocabulary: Vocabulary, job: Job):
        self.job, self._index, self._vocabulary = job, index, vocabulary
        self._texts: list[str] = []
        self._rows: list[Any] = []  # of tokens, where log probabilities are wanted
        self._reason = "null"

    def take(self, event: TokenEvent) -> None:
        self._texts.append(event.text)
        if event.stop_reason is not None:
            self._reason = f'"{_FINISH[event.stop_reason]}"'

    @property
    def has_news(self) -> bool:
        return bool(self._rows) or self._reason != "null" or any(self._texts)

    def told(self, *, streamed: bool) -> str:
        """What came since the last call, as JSON of a choice."""
        text, rows = quoted("".join(self._texts)), self._logprobs()
        self._texts.clear()
        self._rows.clear()
        return (
            f'{{"index":{self._index},{self._content(text, streamed)},"logprobs":{rows},'
            f'"finish_reason":{self._reason}}}'
        )

    @abc.abstractmethod
    def _content(self, text: str, streamed: bool) -> str:
        """The field of a text, which is JSON already."""

    @abc.abstractmethod
    def _logprobs(self) -> str:
        """`_rows` as JSON."""


class Answer(abc.ABC):
    """What a request is answered with.

    id_prefix: of its id; kinds: its `object`, whole and streamed; choices: made by the subclass.
    """

    id_prefix: ClassVar[str]
    kinds: ClassVar[tuple[str, str]]
    choices: list[Any]

    def __init__(self, service: Service, request: CompletionRequest | ChatRequest):
        service.check_model(request.model)
        request.check_stream()
        self._service, self._request = service, request
        self._identity = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self._name, self._created = json.dumps(service.about.name), int(time.time())

    @abc.abstractmethod
    def _counts(self) -> tuple[int, int]:
        """Tokens of prompts and of what came."""

    async def _prepare(self) -> None:  # noqa: B027
        """Between the acceptance of the prompts and the answer; ApiError where it must not come."""

    def _opening(self) -> list[str]:
        """The choices of a stream's first message, if it has one before all tokens."""
        return []

    async def respond(self) -> Response:
        """Raises ApiError for what cannot be done, before anything of the answer is sent."""
        reply = self._service.worker.submit([choice.job for choice in self.choices])
        try:
            await reply.accepted()
            await self._prepare()
        except ApiError as error:
            reply.fail(error)
            raise
        except BaseException:
            reply.drop()
            raise
        if self._request.stream:
            return Events(reply, self._chunks(reply), end=_DONE)
        return Whole(reply, lambda: self._whole(reply))

    async def _chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        start = f"data: {self._head(self.kinds[1])}"
        by_job = {choice.job: choice for choice in self.choices}

        def message(choice: str) -> str:
            return f'{start}"choices":[{choice}]}}\n\n'

        if opening := self._opening():
            yield "".join(map(message, opening)).encode("ascii")
        while arrivals := await reply.arrivals():
            told = []
            for job, group in groupby(arrivals, lambda arrival: arrival[0]):
                choice = by_job[job]
                for _, event in group:
                    choice.take(event)
                if choice.has_news:
                    told.append(message(choice.told(streamed=True)))
            if told:
                yield "".join(told).encode("ascii")
        if self._request.with_usage:
            yield f'{start}"choices":[],{self._usage()}}}\n\n'.encode("ascii")

    async def _whole(self, reply: Reply) -> bytes:
        by_job = {choice.job: choice for choice in self.choices}
        while arrivals := await reply.arrivals():
            for job, event in arrivals:
                by_job[job].take(event)
        choices = ",".join(choice.told(streamed=False) for choice in self.choices)
        head = self._head(self.kinds[0])
        return f'{head}"choices":[{choices}],{self._usage()}}}'.encode("ascii")

    def _head(self, kind: str) -> str:
        return (
            f'{{"id":"{self._identity}","object":"{kind}","created":{self._created},'
            f'"model":{self._name},'
        )

    def _usage(self) -> str:
        prompt, new = self._counts()
        return (
            f'"usage":{{"prompt_tokens":{prompt},"completion_tokens":{new},'
            f'"total_tokens":{prompt + new}}}'
        )
