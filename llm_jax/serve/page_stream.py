"""/api/generate: tokens for the page, each with its chances and what could have stood in its place."""

from collections.abc import AsyncIterator

from fastapi import Response

from llm_jax.generate.events import TokenEvent
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.serve.chat_completions import NO_CHATS
from llm_jax.serve.errors import ApiError
from llm_jax.serve.insight import number
from llm_jax.serve.replies import Events
from llm_jax.serve.requests import PageRequest, Sampling
from llm_jax.serve.service import Service
from llm_jax.serve.worker import Job, MakePrompt, Reply

NUM_ALTERNATIVES = 8


async def generate(service: Service, request: PageRequest) -> Response:
    """Server-sent events: {"prompt": [token]}, then {"tokens": [token]} as they come, {"end": why}.

    A prompt's token has "id", "piece" (as a person is shown it) and "bytes", one per character, so that the
    page decodes characters whose bytes are in several tokens; a new one also "log", and "top": [id, piece, log
    probability] of the best.

    Raises:
      ApiError: what cannot be done, before anything is sent.
    """
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(request, name) for name in fields})
    tokens = service.new_tokens(request.max_tokens, None)
    chats = service.chats if request.question is not None else None
    config: SamplingConfig = sampling.config(
        tokens, service.vocabulary.size, () if chats is None else chats.stops
    )
    job = Job(
        _maker(service, request),
        config,
        alternatives=min(NUM_ALTERNATIVES, service.vocabulary.size),
        stop_tokens=frozenset() if service.chats is None else service.chats.stop_tokens,
    )
    reply = service.worker.submit([job])
    try:
        await reply.accepted()
    except BaseException:
        reply.drop()
        raise
    return Events(reply, _chunks(service, job, reply))


def _maker(service: Service, request: PageRequest) -> MakePrompt:
    given = [n for n in ("text", "question", "tokens") if getattr(request, n) is not None]
    if len(given) != 1:
        raise ApiError(400, "expected one of text, question and tokens", param="text")
    if request.tokens is not None:
        return lambda engine: engine.prompt_tokens(request.tokens)
    if request.question is not None:
        if service.chats is None:
            raise ApiError(400, NO_CHATS, param="question")
        service.check_text(request.question, "question")
        return lambda _: service.chats.prompt([{"role": "user", "content": request.question}])
    if request.text:
        service.check_text(request.text, "text")
    return lambda engine: engine.prompt_tokens(request.text)


async def _chunks(service: Service, job: Job, reply: Reply) -> AsyncIterator[bytes]:
    vocabulary, alternatives = service.vocabulary, service.insight.alternatives
    prompt = ",".join(f"{{{vocabulary.shown(token)}}}" for token in job.prompt)
    yield f'data: {{"prompt":[{prompt}]}}\n\n'.encode("ascii")

    def told(event: TokenEvent) -> str:
        top = alternatives((a.token, a.log_probability) for a in event.alternatives)
        log = number(event.log_probability)
        return f'{{{vocabulary.shown(event.token)},"log":{log},"top":{top}}}'

    while arrivals := await reply.arrivals():
        tokens = ",".join(told(event) for _, event in arrivals)
        yield f'data: {{"tokens":[{tokens}]}}\n\n'.encode("ascii")
        reason = arrivals[-1][1].stop_reason
    yield f'data: {{"end":"{reason}"}}\n\n'.encode("ascii")
