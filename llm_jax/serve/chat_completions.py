"""/v1/chat/completions: a chat, and the assistant's next answer."""

import functools
import json
import secrets
import time
from collections.abc import AsyncIterator
from itertools import groupby
from json.encoder import encode_basestring_ascii as quoted

from fastapi import Response

from llm_jax.generate.events import TokenEvent
from llm_jax.serve.completions import DONE, FINISH, usage
from llm_jax.serve.errors import ApiError
from llm_jax.serve.insight import number
from llm_jax.serve.replies import Events, Whole
from llm_jax.serve.requests import ChatRequest
from llm_jax.serve.service import Service
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Job, Reply

NO_CHATS = (
    "this model was not trained on chats, and its tokenizer brings no template for them: use "
    "/v1/completions, or start the server with --chat_template plain"
)


async def chat(service: Service, request: ChatRequest) -> Response:
    """Raises ApiError for what cannot be done, before anything of the answer is sent."""
    answer = _Answer(service, request)
    reply = service.worker.submit(answer.jobs)
    try:
        await reply.accepted()
    except BaseException:
        reply.drop()
        raise
    if request.stream:
        return Events(reply, answer.chunks(reply), end=DONE)
    return Whole(reply, lambda: answer.whole(reply))


class _Answer:
    def __init__(self, service: Service, request: ChatRequest):
        service.check_model(request.model)
        request.check_stream()
        if service.chats is None:
            raise ApiError(400, NO_CHATS, param="messages")
        if request.top_logprobs is not None and not request.logprobs:
            message = "top_logprobs goes with logprobs: true"
            raise ApiError(400, message, param="top_logprobs")
        self._request, size = request, service.vocabulary.size
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        tokens = service.new_tokens(getattr(request, field), None, field)
        chats, messages = service.chats, [message.plain() for message in request.messages]
        if text := "".join(message["content"] for message in messages):
            service.check_text(text, "messages")
        service.worker.check_count(request.choices)
        maker = functools.cache(lambda _: chats.prompt(messages))  # once for all choices
        config = request.config(tokens, size, (*request.stops, *chats.stops))
        self._choices = [
            _Choice(
                copy,
                service.vocabulary,
                Job(
                    maker,
                    config,
                    number=copy,
                    alternatives=min(request.top_logprobs or 0, size),
                    stop_tokens=chats.stop_tokens,
                ),
                with_logprobs=bool(request.logprobs),
            )
            for copy in range(request.choices)
        ]
        self._by_job = {choice.job: choice for choice in self._choices}
        self.jobs = [choice.job for choice in self._choices]
        self._identity = f"chatcmpl-{secrets.token_hex(12)}"
        self._name, self._created = json.dumps(service.about.name), int(time.time())

    def _head(self, kind: str) -> str:
        return (
            f'{{"id":"{self._identity}","object":"{kind}","created":{self._created},'
            f'"model":{self._name},'
        )

    async def chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        start = f"data: {self._head('chat.completion.chunk')}"
        role = '{"role":"assistant","content":""}'
        yield "".join(
            f'{start}"choices":[{{"index":{choice.index},"delta":{role},"logprobs":null,'
            '"finish_reason":null}]}\n\n'
            for choice in self._choices
        ).encode("ascii")
        while arrivals := await reply.arrivals():
            told = []
            for job, group in groupby(arrivals, lambda arrival: arrival[0]):
                choice = self._by_job[job]
                for _, event in group:
                    choice.take(event)
                if choice.has_news:
                    told.append(f'{start}"choices":[{choice.delta()}]}}\n\n')
            if told:
                yield "".join(told).encode("ascii")
        if self._request.with_usage:
            yield f'{start}"choices":[],"usage":{self._usage()}}}\n\n'.encode("ascii")

    async def whole(self, reply: Reply) -> bytes:
        while arrivals := await reply.arrivals():
            for job, event in arrivals:
                self._by_job[job].take(event)
        choices = ",".join(choice.message() for choice in self._choices)
        head = self._head("chat.completion")
        return f'{head}"choices":[{choices}],"usage":{self._usage()}}}'.encode("ascii")

    def _usage(self) -> str:
        new = sum(choice.job.count for choice in self._choices)
        return usage(len(self._choices[0].job.prompt), new)


class _Choice:
    """One answer as it grows: what was not told yet."""

    def __init__(self, index: int, vocabulary: Vocabulary, job: Job, *, with_logprobs: bool):
        self.index, self.job, self._vocabulary = index, job, vocabulary
        self._with_logprobs = with_logprobs
        self._texts: list[str] = []
        self._rows: list[str] = []
        self._reason = "null"

    def take(self, event: TokenEvent) -> None:
        self._texts.append(event.text)
        if event.stop_reason is not None:
            self._reason = f'"{FINISH[event.stop_reason]}"'
        if self._with_logprobs:
            best = ",".join(
                self._entry(a.token, a.log_probability) + "}" for a in event.alternatives
            )
            entry = self._entry(event.token, event.log_probability)
            self._rows.append(f'{entry},"top_logprobs":[{best}]}}')

    def _entry(self, token: int, log_probability: float) -> str:
        """The beginning of an object."""
        return (
            f'{{"token":{self._vocabulary.text(token)},"logprob":{number(log_probability)},'
            f'"bytes":{self._vocabulary.byte_values(token)}'
        )

    @property
    def has_news(self) -> bool:
        return bool(self._rows) or self._reason != "null" or any(self._texts)

    def delta(self) -> str:
        text, logprobs = self._taken()
        content = f'{{"content":{text}}}' if text != '""' else "{}"
        return (
            f'{{"index":{self.index},"delta":{content},"logprobs":{logprobs},'
            f'"finish_reason":{self._reason}}}'
        )

    def message(self) -> str:
        text, logprobs = self._taken()
        return (
            f'{{"index":{self.index},"message":{{"role":"assistant","content":{text}}},'
            f'"logprobs":{logprobs},"finish_reason":{self._reason}}}'
        )

    def _taken(self) -> tuple[str, str]:
        """Text and log probabilities as JSON, which are then told."""
        text = quoted("".join(self._texts))
        rows = f'{{"content":[{",".join(self._rows)}]}}' if self._with_logprobs else "null"
        self._texts.clear()
        self._rows.clear()
        return text, rows
