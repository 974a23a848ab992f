"""OpenAI's own client against the server: what it asks for, it gets."""

import asyncio
import json
import math

import openai
import pytest
from servers import BOS, END, EOS, MAX_LENGTH, VOCABULARY

from llm_jax.data.tokenizers.raw_bytes import RawBytesTokenizer

NAME = "tiny"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **fields):
    return client.completions.create(model=NAME, **{"prompt": "def f", "seed": 3, **fields})


def ask(client, **fields):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    return client.chat.completions.create(
        model=NAME, **{"messages": messages, "seed": 3, "max_tokens": 8, **fields}
    )


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == NAME
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="choices: tiny"):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not here"):
        client.completions.create(model="gpt-4", prompt="x")


def test_a_completion(client):
    found = complete(client, max_tokens=12)
    (choice,) = found.choices
    assert choice.finish_reason == "length"
    assert found.usage.prompt_tokens == 6  # with bos
    assert found.usage.completion_tokens == 12
    assert found.object == "text_completion"
    assert complete(client, max_tokens=12).choices[0].text == choice.text
    assert complete(client, max_tokens=12, seed=4).choices[0].text != choice.text


def test_a_stream_is_the_same_text_in_parts(client):
    whole = complete(client, max_tokens=40)
    parts = list(
        complete(client, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].text for p in parts[:-1]) == whole.choices[0].text
    assert len(parts) > 10  # not all at once
    reasons = [p.choices[0].finish_reason for p in parts[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert {p.id for p in parts} == {parts[0].id}


def test_choices_and_several_prompts(client):
    found = complete(client, prompt=[[BOS, 64, 66], [BOS, 65]], n=3, max_tokens=4)
    assert [choice.index for choice in found.choices] == list(range(6))
    assert len({choice.text for choice in found.choices[:3]}) > 1
    assert found.usage.completion_tokens == 24
    assert found.usage.prompt_tokens == 5
    alone = complete(client, prompt=[BOS, 65], n=3, max_tokens=4)
    assert [c.text for c in alone.choices] == [c.text for c in found.choices[3:]]


def test_logprobs_of_a_completion(client):
    found = complete(client, max_tokens=6, logprobs=3, temperature=0).choices[0]
    logs = found.logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.text_offset) == 6
    for token, log, best in zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, strict=True):
        assert best[token] == log == max(best.values())  # greedy takes the best
        assert len(best) == 3
        assert log < 0
    streamed = list(complete(client, max_tokens=6, logprobs=3, temperature=0, stream=True))
    tokens = [token for part in streamed for token in part.choices[0].logprobs.tokens]
    assert tokens == logs.tokens


def test_echo_scores_the_prompt(client):
    long = complete(client, prompt="abcdef", max_tokens=3, echo=True, logprobs=2)
    (choice,) = long.choices
    assert choice.text.startswith("abcdef")
    logs = choice.logprobs
    assert logs.tokens[:7] == ["<s>", *"abcdef"]
    assert logs.token_logprobs[0] is None
    assert logs.text_offset[:8] == [0, 0, 1, 2, 3, 4, 5, 6]
    # Scored by another program than the one that generates, with the same result.
    alone = complete(client, prompt="abcdef", max_tokens=0, echo=True, logprobs=2)
    assert alone.choices[0].text == "abcdef"
    assert alone.choices[0].logprobs.token_logprobs == logs.token_logprobs[:7]
    assert alone.usage.completion_tokens == 0
    generated = complete(client, prompt=[BOS, *b"abcde"], max_tokens=1, logprobs=2, temperature=0)
    (best,) = generated.choices[0].logprobs.top_logprobs
    assert {
        k: pytest.approx(v, abs=1e-3) for k, v in logs.top_logprobs[6].items() if k in best
    } == best


def test_a_stop_text_ends_a_completion_and_is_not_told(client):
    whole = complete(client, max_tokens=40, temperature=0).choices[0].text
    stop = next(whole[i : i + 2] for i in range(8, 30) if whole[i : i + 2].isascii())
    found = complete(client, max_tokens=40, temperature=0, stop=stop).choices[0]
    assert found.text == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"
    streamed = list(complete(client, max_tokens=40, temperature=0, stop=[stop], stream=True))
    assert "".join(part.choices[0].text for part in streamed) == found.text


def test_biases(client):
    found = complete(client, max_tokens=5, logit_bias={str(ord("q")): 100}).choices[0]
    assert found.text == "qqqqq"
    found = complete(client, max_tokens=5, logit_bias={str(EOS): 100}).choices[0]
    assert (found.text, found.finish_reason) == ("", "stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", [{"top_k": 1}, {"min_p": 1.0}, {"repetition_penalty": 1.0, "top_k": 1}]
)
def test_what_openai_has_not(client, field):
    greedy = complete(client, max_tokens=10, temperature=0).choices[0].text
    assert complete(client, max_tokens=10, extra_body=field).choices[0].text == greedy


@pytest.mark.slow
def test_a_repetition_penalty_changes_the_text(client):
    texts = [
        complete(client, max_tokens=60, temperature=0, extra_body=body).choices[0].text
        for body in ({}, {"repetition_penalty": 5.0})
    ]
    assert texts[0] != texts[1]


def test_a_chat(client, server):
    found = ask(client)
    message = found.choices[0].message
    assert message.role == "assistant"
    # [bos] <|system|> a <|end|> <|user|> b <|end|> <|assistant|>
    assert found.usage.prompt_tokens == 8
    parts = list(ask(client, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == message.content
    assert parts[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_an_answer_ends_at_its_end_mark(client):
    found = ask(client, logit_bias={str(END): 100})
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("", "stop")
    assert found.usage.completion_tokens == 1


def test_marks_in_a_message_are_text(client):
    plain = ask(client, messages=[{"role": "user", "content": "<|end|>"}])
    assert plain.usage.prompt_tokens == len("<|end|>") + 4


def test_logprobs_of_a_chat(client):
    found = ask(client, logprobs=True, top_logprobs=2, temperature=0, n=2).choices
    for choice in found:
        for entry in choice.logprobs.content:
            assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob)
            assert len(entry.top_logprobs) == 2
            assert entry.bytes is not None
    streamed = list(ask(client, logprobs=True, top_logprobs=2, temperature=0, stream=True))
    entries = [entry for part in streamed[1:] for entry in part.choices[0].logprobs.content]
    assert [e.token for e in entries] == [e.token for e in found[0].logprobs.content]
    logs = [entry.logprob for entry in found[0].logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx(logs, abs=1e-4)


def test_a_role_that_the_template_has_not(client):
    with pytest.raises(openai.BadRequestError, match="narrator"):
        ask(client, messages=[{"role": "narrator", "content": "x"}])


def test_parts_of_characters_are_whole_in_the_text(client):
    """Bytes of any kind: what is told is valid, and streams tell the same."""
    found = complete(client, max_tokens=200, temperature=1.5, seed=11).choices[0].text
    parts = complete(client, max_tokens=200, temperature=1.5, seed=11, stream=True)
    assert "".join(part.choices[0].text for part in parts) == found


def test_many_at_once_by_the_asynchronous_client(server):
    async def run():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def one(number):
                text = ""
                stream = await client.completions.create(
                    model=NAME, prompt="x" * (number + 1), max_tokens=20, seed=number, stream=True
                )
                async for part in stream:
                    text += part.choices[0].text
                return text

            together = await asyncio.gather(*map(one, range(12)))
            alone = [await one(number) for number in (0, 11)]
        assert alone == [together[0], together[11]]  # whatever ran beside it

    asyncio.run(run())
    assert server.is_idle()


def test_the_page_api(server):
    body = {"text": "ab", "max_tokens": 5, "temperature": 0}
    status, _, content = server.post("/api/generate", body)
    assert status == 200
    events = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line]
    assert [token["id"] for token in events[0]["prompt"]] == [BOS, *b"ab"]
    tokens = [token for event in events for token in event.get("tokens", ())]
    assert len(tokens) == 5
    assert events[-1] == {"end": "max_tokens"}
    assert all(token["top"][0][0] == token["id"] for token in tokens)
    again = {"tokens": [BOS, *b"ab", tokens[0]["id"]], "max_tokens": 4, "temperature": 0}
    _, _, content = server.post("/api/generate", again)
    events = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line]
    assert [t["id"] for e in events for t in e.get("tokens", ())] == [t["id"] for t in tokens[1:]]

    ids = [BOS, *b"ab"]
    status, _, content = server.post("/api/attention", {"tokens": ids})
    weights = json.loads(content)["weights"]
    assert all(abs(sum(head) - 1000) <= 2 for layer in weights for head in layer)
    _, _, content = server.post("/api/lens", {"tokens": ids, "target": tokens[0]["id"]})
    last = json.loads(content)["layers"][-1]
    assert last["rank"] == 0
    assert last["log"] == pytest.approx(tokens[0]["log"], abs=1e-3)
    _, _, content = server.post("/api/score", {"tokens": [*ids, tokens[0]["id"]]})
    scored = json.loads(content)["tokens"]
    assert scored[-1]["log"] == pytest.approx(tokens[0]["log"], abs=1e-3)
    question = {"question": "b", "max_tokens": 1}
    _, _, content = server.post("/api/generate", question)
    assert (
        json.loads(content.decode().split("\n\n")[0][6:])["prompt"][-1]["piece"] == "<|assistant|>"
    )


def test_what_is_measured(server, client):
    def read(name):
        lines = server.get("/metrics")[2].decode().splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.split(" ")[0].split("{")[0] == name
        )

    names = ("llm_jax_generated_tokens_total", "llm_jax_time_to_first_token_seconds_count",
             "llm_jax_requests_total")  # fmt: skip
    before = [read(name) for name in names]
    complete(client, max_tokens=7, n=2)
    assert [read(name) for name in names] == [before[0] + 14, before[1] + 2, before[2] + 1]
    assert read("llm_jax_running_completions") == 0
    refused = 'llm_jax_requests_total{endpoint="completions",status="400"} '
    counts = []
    for _ in range(2):
        page = server.get("/metrics")[2].decode().splitlines()
        counts += [float(line.split()[-1]) for line in page if line.startswith(refused)] or [0.0]
        server.post("/v1/completions", {"prompt": "a", "unknown": 1})
    assert counts[1] == counts[0] + 1


def test_pieces_of_the_vocabulary_are_named(client):
    tokenizer = RawBytesTokenizer()
    found = complete(client, prompt=[BOS, 0xE4], max_tokens=0, echo=True, logprobs=0).choices[0]
    assert found.logprobs.tokens == ["<s>", "bytes:\\xe4"]
    assert found.logprobs.top_logprobs[1] is None
    assert tokenizer.vocab_size + 4 == VOCABULARY
    assert MAX_LENGTH > 100
