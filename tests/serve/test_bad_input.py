"""Whatever is sent, the answer is an OpenAI-style error of 4xx, and the server goes on as before."""

import http.client
import json
import random
import urllib.parse

import pytest
from servers import BOS, MAX_LENGTH

GOOD = {"prompt": "ab", "max_tokens": 3, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}

BAD = {
    b"": "expected a JSON object",
    b"{": "no JSON",
    b"nonsense": "no JSON",
    b'{"prompt": "a"} x': "no JSON",
    b"[]": "expected a JSON object",
    b"null": "expected a JSON object",
    b'"text"': "expected a JSON object",
    b"\xff\xfe{}": "",
    b"\x00": "",
    b"[" * 100_000: "",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "",
    b'{"prompt":' * 5000: "",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": "",
    b"{}": "prompt is missing",
    b'{"prompt": null}': "prompt: expected a text",
    b'{"prompt": ""}': "prompt is empty",
    b'{"prompt": []}': "prompt is empty",
    b'{"prompt": [[]]}': "prompt is empty",
    b'{"prompt": ["a", ""]}': "prompt is empty",
    b'{"prompt": ["a", 5]}': "prompt: expected",
    b'{"prompt": [[5, "a"]]}': "prompt: expected",
    b'{"prompt": [true]}': "prompt: expected",
    b'{"prompt": [1.5]}': "prompt: expected",
    b'{"prompt": {"a": 1}}': "prompt: expected",
    b'{"prompt": [263]}': "token id 263",
    b'{"prompt": [-1]}': "prompt: expected",
    b'{"prompt": [1e99]}': "prompt: expected",
    b'{"prompt": [99999999999999999999999]}': "prompt: expected",
    b'{"prompt": "\\ud800"}': "lone surrogate",
    b'{"prompt": ["\\udfff a"]}': "lone surrogate",
    b'{"prompt": "a", "stop": "\\ud800"}': "lone surrogate",
    b'{"prompt": "a", "temperature": NaN}': "temperature: input should be a finite number",
    b'{"prompt": "a", "temperature": Infinity}': "temperature",
    b'{"prompt": "a", "temperature": -0.1}': "greater than or equal to 0, not -0.1",
    b'{"prompt": "a", "temperature": 1e400}': "temperature",
    b'{"prompt": "a", "temperature": "1"}': "temperature: input should be a valid number, not '1'",
    b'{"prompt": "a", "temperature": true}': "temperature",
    b'{"prompt": "a", "top_p": 0}': "top_p",
    b'{"prompt": "a", "top_p": 1.01}': "top_p",
    b'{"prompt": "a", "top_k": 0}': "top_k",
    b'{"prompt": "a", "top_k": -1}': "top_k",
    b'{"prompt": "a", "min_p": -1}': "min_p",
    b'{"prompt": "a", "repetition_penalty": 0}': "repetition_penalty",
    b'{"prompt": "a", "max_tokens": -5}': "max_tokens",
    b'{"prompt": "a", "max_tokens": 0}': "max_tokens 0 goes with echo",
    b'{"prompt": "a", "max_tokens": 513}': "max_tokens 513 is above 512",
    b'{"prompt": "a", "max_tokens": 999999999999}': "max_tokens",
    b'{"prompt": "a", "max_tokens": 1.5}': "max_tokens",
    b'{"prompt": "a", "n": 0}': "n: ",
    b'{"prompt": "a", "n": 100}': "at most 32",
    b'{"prompt": "a", "n": 1000000}': "n: ",
    b'{"prompt": "a", "best_of": 2}': "best_of",
    b'{"prompt": "a", "suffix": "b"}': "suffix",
    b'{"prompt": "a", "presence_penalty": 0.5}': "presence_penalty",
    b'{"prompt": "a", "logprobs": 21}': "logprobs",
    b'{"prompt": "a", "logprobs": true}': "logprobs",
    b'{"prompt": "a", "stop": ""}': "stop: expected",
    b'{"prompt": "a", "stop": [""]}': "stop: expected",
    b'{"prompt": "a", "stop": 5}': "stop: expected",
    b'{"prompt": "a", "stop": ' + json.dumps(["x"] * 17).encode() + b"}": "stop: expected",
    b'{"prompt": "a", "logit_bias": {"a": 1}}': "logit_bias",
    b'{"prompt": "a", "logit_bias": {"-1": 1}}': "logit_bias",
    b'{"prompt": "a", "logit_bias": {"300": 1}}': "logit_bias: token id 300",
    b'{"prompt": "a", "logit_bias": {"5": 101}}': "logit_bias",
    b'{"prompt": "a", "logit_bias": {"5": NaN}}': "logit_bias",
    b'{"prompt": "a", "logit_bias": [5]}': "logit_bias",
    json.dumps(
        {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(2000)), 1)}
    ).encode(): "at most 1024",
    json.dumps({"prompt": "a", **dict.fromkeys(map(str, range(50_000)), 1)}).encode(): "at most 64",
    json.dumps({"prompt": [True] * 150_000}).encode(): "prompt: expected",
    json.dumps({"prompt": ["a"] * 150_000}).encode(): "prompt: expected",
    json.dumps({"prompt": ["a"] * 100, "n": 128}).encode(): "12800 completions",
    b'{"prompt": "a", "seed": 1.5}': "seed",
    b'{"prompt": "a", "seed": 9223372036854775808}': "seed",
    b'{"prompt": "a", "stream": "yes"}': "stream",
    b'{"prompt": "a", "stream_options": {"include_usage": true}}': "stream_options goes with",
    b'{"prompt": "a", "stream": true, "stream_options": {"x": 1}}': "unknown field 'stream_options.x'",
    b'{"prompt": "a", "temprature": 1}': "unknown field 'temprature'",
    b'{"prompt": "a", "__proto__": {}}': "unknown field",
    b'{"prompt": "a", "\\ud800": 1}': "lone surrogate",
    b'{"prompt": "a", "model": 5}': "model",
    b'{"prompt": "a", "model": "../../etc/passwd"}': "is not here",
    json.dumps({"prompt": "a" * MAX_LENGTH}).encode(): "leaves room for at most 511",
    json.dumps({"prompt": "a" * (MAX_LENGTH + 1)}).encode(): "has places for 512 tokens",
    json.dumps({"prompt": [BOS] * (MAX_LENGTH + 1)}).encode(): "513 tokens",
}
BAD_CHATS = {
    b"{}": "messages is missing",
    b'{"messages": []}': "messages",
    b'{"messages": "a"}': "messages",
    b'{"messages": [{}]}': "messages.0.role is missing",
    b'{"messages": [{"role": "user"}]}': "messages.0.content is missing",
    b'{"messages": [{"role": "user", "content": null}]}': "expected a text",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "expected a text",
    b'{"messages": [{"role": 5, "content": "a"}]}': "messages",
    b'{"messages": [{"role": "tool", "content": "a"}]}': "tool",
    b'{"messages": [{"role": "\\ud800", "content": "a"}]}': "lone surrogate",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "lone surrogate",
    b'{"messages": [{"role": "user", "content": "a", "x": 1}]}': "unknown field",
    b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}': "goes with logprobs",
    b'{"messages": [{"role": "user", "content": "a"}], "logprobs": 2}': "logprobs",
    b'{"messages": [{"role": "user", "content": "a"}], "tools": []}': "unknown field 'tools'",
    b'{"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 600}': "max_completion_tokens 600",
    b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}': "response_format",
}
BAD_PAGES = {
    "/api/generate": [{}, {"text": "a", "tokens": [1]}, {"tokens": []}, {"tokens": [999]}, {"text": 5}],
    "/api/attention": [{}, {"tokens": []}, {"tokens": [999]}, {"tokens": [1] * 513}, {"tokens": "a"}],
    "/api/score": [{}, {"tokens": []}, {"tokens": [-1]}, {"tokens": [[1]]}],
    "/api/lens": [{"tokens": [1]}, {"tokens": [1], "target": 263}, {"tokens": [1], "target": -1}],
}  # fmt: skip


def check(status: int, headers: dict, content: bytes) -> str:
    """The message of an error that is as it should be."""
    assert 400 <= status < 500, (status, content)
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 400
    return error["message"]


@pytest.fixture
def unharmed(server):
    """Afterwards a good request is answered, and nothing holds a slot."""
    yield server
    status, _, content = server.post("/v1/completions", GOOD)
    assert status == 200
    assert json.loads(content)["usage"]["completion_tokens"] == 3
    assert server.is_idle()
    assert server.process.poll() is None


@pytest.mark.parametrize(
    ("path", "cases"), [("/v1/completions", BAD), ("/v1/chat/completions", BAD_CHATS)]
)
def test_bad_bodies(unharmed, path, cases):
    for body, message in cases.items():
        found = check(*unharmed.post(path, body))
        assert message in found, (body[:100], found)


def test_bad_bodies_of_the_page(unharmed):
    for path, bodies in BAD_PAGES.items():
        for body in bodies:
            check(*unharmed.post(path, body))


def test_other_kinds_of_content(unharmed):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        body = json.dumps(GOOD).encode()
        message = check(*unharmed.ask("POST", "/v1/completions", body, **{"content-type": kind}))
        assert "application/json" in message


def test_paths_and_methods_that_are_not_there(unharmed):
    for method, path, status in (
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("OPTIONS", "/v1/completions", 405),
        ("GET", "/nowhere", 404), ("GET", "/page/../../settings.py", 404), ("GET", "/docs", 404),
        ("GET", "/%2e%2e/app.py", 404), ("GET", "/page.css%00", 404), ("POST", "/v1/embeddings", 404),
    ):  # fmt: skip
        found = unharmed.ask(method, path, None)
        assert found[0] == status, path
        check(*found)


class Requests:
    """Random requests: good ones, changed in one to three places to something that may be anything."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)

    def __call__(self) -> tuple[str, bytes]:
        rng = self._rng
        path, body = rng.choice([
            ("/v1/completions", GOOD), ("/v1/completions", GOOD), ("/v1/chat/completions", CHAT),
            ("/api/generate", {"text": "a", "max_tokens": 2}), ("/api/lens", {"tokens": [5], "target": 3}),
            ("/api/attention", {"tokens": [5]}), ("/api/score", {"tokens": [5]}),
        ])  # fmt: skip
        body = json.loads(json.dumps(body))
        for _ in range(rng.randint(1, 3)):
            self._change(body)
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.15:
            place = rng.randrange(len(text))
            junk = rng.choice([b"", b"\x00", b'"', b"\xff", b"{", b"]", b"\\u", b"1e999"])
            text = text[:place] + junk + text[place + rng.randint(0, 3) :]
        return path, text

    def _change(self, body: dict) -> None:
        rng = self._rng
        names = [
            *body, "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logit_bias", "stream", "echo",
            "logprobs", "top_logprobs", "model", "user", "stream_options", "repetition_penalty", "best_of",
            "presence_penalty", "suffix", "tokens", "question", "x",
        ]  # fmt: skip
        name = rng.choice(names)
        if name in body and rng.random() < 0.2:
            del body[name]
        elif isinstance(body.get(name), list | dict) and body[name] and rng.random() < 0.5:
            inner = body[name]
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner[key] = self._value(2)
        else:
            body[name] = self._value(3)

    def _value(self, depth: int):
        rng = self._rng
        if depth and rng.random() < 0.3:
            size = rng.randint(0, 3)
            if rng.random() < 0.5:
                return [self._value(depth - 1) for _ in range(size)]
            return {str(self._value(0))[:20]: self._value(depth - 1) for _ in range(size)}
        return rng.choice([
            None, True, False, 0, 1, 2, 3, -1, 257, 300, 0.5, 1.0, -0.0, 1e-300, 1e300, 2**31, 2**32, 2**63, 2**64,
            -(2**63), 10**30, float("nan"), float("inf"), -float("inf"), "", "a", " ", "\n", "\x00", "\ud800",
            "\U0001f600", "中", "\u202e", "1", "nan", "tiny", "user", "text", "x" * rng.choice([10, 300, 600]),
        ])  # fmt: skip


def send_random(server, count: int, seed: int) -> dict[int, int]:
    """Sends them over one connection, as long as it holds; counts how each was answered."""
    statuses: dict[int, int] = {}
    requests, host = Requests(seed), urllib.parse.urlsplit(server.url).netloc
    connection = http.client.HTTPConnection(host, timeout=60)
    for _ in range(count):
        path, body = requests()
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        statuses[response.status] = statuses.get(response.status, 0) + 1
        if response.status != 200:
            check(response.status, {}, content)
            assert response.status in (400, 404, 413, 429), (path, body)
    connection.close()
    return statuses


def test_random_requests(unharmed):
    statuses = send_random(unharmed, 400, seed=0)
    assert statuses[400] > 100
    assert statuses[200] > 10


@pytest.mark.slow
def test_a_hundred_thousand_random_requests(unharmed):
    statuses = send_random(unharmed, 100_000, seed=1)
    assert sum(statuses.values()) == 100_000
    assert statuses[200] > 1000
