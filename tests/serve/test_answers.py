"""What answers say and how they are counted, without a model."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.data.tokenizers.raw_bytes import RawBytesTokenizer
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.interpret.token_probabilities import TokenProbabilities
from llm_jax.serve.app import Counted
from llm_jax.serve.completions import CompletionChoice
from llm_jax.serve.errors import ApiError
from llm_jax.serve.guard import Guard
from llm_jax.serve.measures import Measures
from llm_jax.serve.replies import Events, Whole
from llm_jax.serve.settings import ServeConfig
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Job


def counted(path, answer, *, authorization=b"Bearer k"):
    """The lines of /metrics about requests after one; answer: of a reply, how its body is made."""
    measures = Measures(lambda: 0, lambda: 0)

    async def app(scope, receive, send):
        reply = SimpleNamespace(deadline=asyncio.get_running_loop().time() + 9, drop=lambda: None)
        await answer(reply)(scope, receive, send)

    body = [{"type": "http.request"}]

    async def receive():
        if not body:
            await asyncio.sleep(60)
        return body.pop()

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": path,
             "headers": [(b"host", b"localhost"), (b"authorization", authorization)]}  # fmt: skip
    guarded = Guard(app, ServeConfig(api_key="k"), frozenset())
    asyncio.run(Counted(guarded, measures)(scope, receive, send))
    lines = measures.page().decode().splitlines()
    return [line for line in lines if line.startswith("llm_jax_requests_total{")]


async def good():
    return b"{}"


async def late():
    raise ApiError(504, "too late")


async def stream(make):
    yield b"data: 1\n\n"
    yield await make()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda reply: Whole(reply, good), "ok"),
        (lambda reply: Whole(reply, late), "504"),
        (lambda reply: Events(reply, stream(good)), "ok"),
        (lambda reply: Events(reply, stream(late)), "504"),
        (lambda reply: ApiError(400, "wrong").response(), "400"),
    ],
)
def test_a_request_is_counted_by_how_it_ended(answer, status):
    line = f'llm_jax_requests_total{{endpoint="chat_completions",status="{status}"}} 1.0'
    assert counted("/v1/chat/completions", answer) == [line]
    assert counted("/v1/nowhere", answer) == []


def test_a_request_without_a_key_is_counted():
    found = counted("/api/generate", lambda reply: Whole(reply, good), authorization=b"")
    assert found == ['llm_jax_requests_total{endpoint="generate",status="401"} 1.0']


@pytest.mark.parametrize(
    ("spelled", "offsets"), [(["", " a", "b"], [0, 0, 1]), (["", "a", "b"], [0, 0, 1])]
)
def test_offsets_of_an_echo(monkeypatch, spelled, offsets):
    """With the space that some tokenizers put before a text, and without."""
    vocabulary = Vocabulary(RawBytesTokenizer())
    monkeypatch.setattr(vocabulary, "spelled", lambda ids: spelled)
    job = Job(lambda _: [], SamplingConfig(max_tokens=1))
    choice = CompletionChoice(0, vocabulary, job, with_logprobs=True, silent=False)
    scores = TokenProbabilities(np.zeros(2), np.zeros((2, 0), np.int32), np.zeros((2, 0)))
    choice.echo("ab", [256, 97, 98], scores)
    assert f'"text_offset":{str(offsets).replace(" ", "")}' in choice.told(streamed=False)
