"""/v1/completions: a text, and how it goes on."""

import functools

from llm_jax.generate.events import TokenEvent
from llm_jax.interpret.token_probabilities import TokenProbabilities
from llm_jax.serve.answer import Answer, Choice
from llm_jax.serve.errors import ApiError
from llm_jax.serve.insight import number
from llm_jax.serve.requests import CompletionRequest
from llm_jax.serve.service import Service
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Job, MakePrompt

DEFAULT_TOKENS = 16  # OpenAI's


class CompletionAnswer(Answer):
    """Raises ApiError for what the model, or this server, cannot do."""

    id_prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(self, service: Service, request: CompletionRequest):
        super().__init__(service, request)
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
        self.choices = [
            CompletionChoice(
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

    async def _prepare(self) -> None:
        """For echo: the prompts' texts, and what the model thinks of them."""
        request, copies = self._request, self._request.choices
        if not request.echo:
            return
        for first in range(0, len(self.choices), copies):
            prompt, ids = self._prompts[first // copies], self.choices[first].job.prompt
            text = prompt if isinstance(prompt, str) else self._service.vocabulary.decode(ids)
            scores = None
            if request.logprobs is not None:
                scores = await self._service.insight.probabilities(ids, request.logprobs)
            for choice in self.choices[first : first + copies]:
                choice.echo(text, ids, scores)

    def _counts(self) -> tuple[int, int]:
        prompts = self.choices[:: self._request.choices]
        new = 0 if self._silent else sum(choice.job.count for choice in self.choices)
        return sum(len(choice.job.prompt) for choice in prompts), new


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


class CompletionChoice(Choice):
    """silent: nothing but the prompt is told."""

    def __init__(
        self, index: int, vocabulary: Vocabulary, job: Job, *, with_logprobs: bool, silent: bool
    ):
        super().__init__(index, vocabulary, job)
        self._with_logprobs, self._silent = with_logprobs, silent
        self._length = 0

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

    def take(self, event: TokenEvent) -> None:
        if self._silent:
            self._reason = '"length"'
            return
        super().take(event)
        if self._with_logprobs:
            log = number(event.log_probability)
            pairs = ((a.token, a.log_probability) for a in event.alternatives)
            best = self._best(event.token, log, pairs)
            # A token, its log probability, alternatives, its offset in the text.
            self._rows.append((self._vocabulary.text(event.token), log, best, self._length))
        self._length += len(event.text)

    def _content(self, text: str, streamed: bool) -> str:
        return f'"text":{text}'

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
