"""/v1/completions: a text, and how it goes on."""

import functools
import json
import secrets
import time
from collections.abc import AsyncIterator
from itertools import groupby
from json.encoder import encode_basestring_ascii as quoted

from fastapi import Response

from llm_jax.generate.events import TokenEvent
from llm_jax.interpret.token_probabilities import TokenProbabilities
from llm_jax.serve.errors import ApiError
from llm_jax.serve.insight import number
from llm_jax.serve.replies import Events, Whole
from llm_jax.serve.requests import CompletionRequest
from llm_jax.serve.service import Service
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Job, MakePrompt, Reply

DONE = b"data: [DONE]\n\n"
FINISH = {"eos": "stop", "stop": "stop", "max_tokens": "length", "length_limit": "length"}
DEFAULT_TOKENS = 16  # OpenAI's


async def complete(service: Service, request: CompletionRequest) -> Response:
    """Raises ApiError for what cannot be done, before anything of the answer is sent."""
    answer = _Answer(service, request)
    reply = service.worker.submit(answer.jobs)
    try:
        await reply.accepted()
        if request.echo:
            await answer.read_prompts()
    except ApiError as error:
        reply.fail(error)
        raise
    except BaseException:
        reply.drop()
        raise
    if request.stream:
        return Events(reply, answer.chunks(reply), end=DONE)
    return Whole(reply, lambda: answer.whole(reply))


class _Answer:
    def __init__(self, service: Service, request: CompletionRequest):
        service.check_model(request.model)
        request.check_stream()
        self._service, self._request = service, request
        asked = request.max_tokens
        if asked == 0 and not request.echo:
            message = "max_tokens 0 goes with echo: true, which scores a prompt"
            raise ApiError(400, message, param="max_tokens")
        if request.echo and service.about.has_encoder:
            message = "echo: this model answers a prompt, and does not go on from it"
            raise ApiError(400, message, param="echo")
        if request.best_of not in (None, request.choices):
            message = (
                f"best_of {request.best_of}: only the value of n, {request.choices}, can be served"
            )
            raise ApiError(400, message, param="best_of")
        # Where nothing is to come, one token does, and is not told: a prompt is accepted by the engine alone.
        self._silent = asked == 0
        tokens = service.new_tokens(asked or None, DEFAULT_TOKENS) if asked != 0 else 1
        self._prompts = _prompts(service, request)
        size = service.vocabulary.size
        config = request.config(tokens, size)
        self._choices = [
            _Choice(
                place * request.choices + copy,
                service.vocabulary,
                Job(
                    maker,
                    config,
                    number=copy,
                    alternatives=min(request.logprobs or 0, size),
                ),
                with_logprobs=request.logprobs is not None,
                silent=self._silent,
            )
            for place, maker in enumerate(map(_maker, self._prompts))
            for copy in range(request.choices)
        ]
        self._by_job = {choice.job: choice for choice in self._choices}
        self.jobs = [choice.job for choice in self._choices]
        identity = f"cmpl-{secrets.token_hex(12)}"
        self._head = (
            f'{{"id":"{identity}","object":"text_completion","created":{int(time.time())},'
            f'"model":{json.dumps(service.about.name)},'
        )

    async def read_prompts(self) -> None:
        """For echo: the prompts' texts, and what the model thinks of them."""
        request, copies = self._request, self._request.choices
        for first in range(0, len(self._choices), copies):
            prompt, ids = self._prompts[first // copies], self._choices[first].job.prompt
            text = prompt if isinstance(prompt, str) else self._service.vocabulary.decode(ids)
            scores = None
            if request.logprobs is not None:
                scores = await self._service.insight.probabilities(ids, request.logprobs)
            for choice in self._choices[first : first + copies]:
                choice.echo(text, ids, scores)

    async def chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        start = f"data: {self._head}"
        while arrivals := await reply.arrivals():
            told = []
            for job, group in groupby(arrivals, lambda arrival: arrival[0]):
                choice = self._by_job[job]
                choice.take([event for _, event in group])
                if choice.has_news:
                    told.append(f'{start}"choices":[{choice.told()}]}}\n\n')
            if told:
                yield "".join(told).encode("ascii")
        if self._request.with_usage:
            yield f'{start}"choices":[],"usage":{self._usage()}}}\n\n'.encode("ascii")

    async def whole(self, reply: Reply) -> bytes:
        while arrivals := await reply.arrivals():
            for job, event in arrivals:
                self._by_job[job].take([event])
        choices = ",".join(choice.told() for choice in self._choices)
        return f'{self._head}"choices":[{choices}],"usage":{self._usage()}}}'.encode("ascii")

    def _usage(self) -> str:
        prompts = self._choices[:: self._request.choices]
        new = 0 if self._silent else sum(choice.job.count for choice in self._choices)
        return usage(sum(len(choice.job.prompt) for choice in prompts), new)


def usage(prompt: int, completion: int) -> str:
    return (
        f'{{"prompt_tokens":{prompt},"completion_tokens":{completion},'
        f'"total_tokens":{prompt + completion}}}'
    )


def _prompts(service: Service, request: CompletionRequest) -> list[str | list[int]]:
    given = request.prompt
    many = isinstance(given, list) and given and not isinstance(given[0], int)
    prompts = given if many else [given]
    service.worker.check_count(len(prompts) * request.choices)
    for prompt in prompts:
        if isinstance(prompt, str):
            service.check_text(prompt, "prompt")
        elif not prompt:
            raise ApiError(400, "prompt is empty: expected one token id at least", param="prompt")
    return prompts


def _maker(prompt: str | list[int]) -> MakePrompt:
    """Once for all choices."""
    return functools.cache(lambda engine: engine.prompt_tokens(prompt))


class _Choice:
    """One completion as it grows: what was not told yet."""

    def __init__(
        self, index: int, vocabulary: Vocabulary, job: Job, *, with_logprobs: bool, silent: bool
    ):
        self.job, self._index, self._vocabulary = job, index, vocabulary
        self._with_logprobs, self._silent = with_logprobs, silent
        self._texts: list[str] = []
        self._rows: list[tuple[str, str, str, int]] = []  # token, its log, alternatives, offset
        self._length, self._reason = 0, "null"

    def echo(self, text: str, ids: list[int], scores: TokenProbabilities | None) -> None:
        self._texts.append(text)
        if scores is not None:
            name = self._vocabulary.text
            spelled = self._vocabulary.spelled(ids)
            # Below 0: some tokenizers put a space before a text, which is not of the text.
            offset = min(0, len(text) - sum(map(len, spelled)))
            for place, token in enumerate(ids):
                log, best = "null", "null"
                if place > 0:
                    log = number(float(scores.log_probabilities[place - 1]))
                    pairs = zip(
                        scores.best_tokens[place - 1].tolist(),
                        scores.best_log_probabilities[place - 1].tolist(),
                        strict=True,
                    )
                    best = self._best(token, log, pairs)
                self._rows.append((name(token), log, best, max(offset, 0)))
                offset += len(spelled[place])
        self._length = len(text)

    def take(self, events: list[TokenEvent]) -> None:
        last = events[-1].stop_reason
        if last is not None:
            self._reason = f'"{"length" if self._silent else FINISH[last]}"'
        if self._silent:
            return
        for event in events:
            if self._with_logprobs:
                log = number(event.log_probability)
                pairs = ((a.token, a.log_probability) for a in event.alternatives)
                best = self._best(event.token, log, pairs)
                self._rows.append((self._vocabulary.text(event.token), log, best, self._length))
            self._texts.append(event.text)
            self._length += len(event.text)

    @property
    def has_news(self) -> bool:
        return bool(self._rows) or self._reason != "null" or any(self._texts)

    def told(self) -> str:
        """What came since the last call, as JSON of a choice."""
        text = quoted("".join(self._texts))
        told = (
            f'{{"index":{self._index},"text":{text},"logprobs":{self._logprobs()},'
            f'"finish_reason":{self._reason}}}'
        )
        self._texts.clear()
        self._rows.clear()
        return told

    def _logprobs(self) -> str:
        if not self._with_logprobs:
            return "null"
        tokens, logs, best, offsets = zip(*self._rows, strict=True) if self._rows else [()] * 4
        return (
            f'{{"tokens":[{",".join(tokens)}],"token_logprobs":[{",".join(logs)}],'
            f'"top_logprobs":[{",".join(best)}],"text_offset":[{",".join(map(str, offsets))}]}}'
        )

    def _best(self, token: int, log: str, pairs) -> str:
        """{text: log probability}, the token itself included; null where none was asked for."""
        name = self._vocabulary.text
        entries = {name(i): number(value) for i, value in pairs}
        if not entries:
            return "null"
        entries.setdefault(name(token), log)
        return "{" + ",".join(f"{text}:{value}" for text, value in entries.items()) + "}"
