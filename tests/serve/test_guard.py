"""The guard alone, around an application that is never reached when it should not be."""

import asyncio
import json

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.serve import guard
from llm_jax.serve.settings import ServeConfig, read_api_key

KEY = "sesame-open-5f2c"


def ask(config, path="/v1/models", host="localhost", body=(b"",), **headers):
    """(status, error or None, body that the application saw) of one request; body: its parts."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    parts = [
        {"type": "http.request", "body": part, "more_body": place < len(body) - 1}
        for place, part in enumerate(body)
    ]

    async def receive():
        if not parts:
            await asyncio.sleep(60)
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    given = {"host": host, **headers}
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items() if v is not None],
    }  # fmt: skip
    asyncio.run(guard.Guard(app, config, frozenset({"/"}))(scope, receive, send))
    names = dict(sent[0]["headers"])
    assert b"default-src 'none'" in names[b"content-security-policy"]
    status = sent[0]["status"]
    error = json.loads(sent[1]["body"])["error"] if status >= 400 else None
    assert bool(seen) == (status == 200)
    assert KEY not in json.dumps(error)
    return status, error, seen[0] if seen else None


def test_a_key():
    config = ServeConfig(api_key=KEY)
    assert ask(config, authorization=f"Bearer {KEY}")[0] == 200
    assert ask(config, path="/")[0] == 200
    for wrong in (
        None,
        "",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer ",
        f"bearer\xe9 {KEY}",
    ):
        status, error, _ = ask(config, authorization=wrong)
        assert (status, error["code"]) == (401, "invalid_api_key"), wrong
    assert ask(ServeConfig())[0] == 200
    assert KEY not in repr(config)


@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "[::1]", 200),
        ("127.0.0.1", "192.168.0.5", 400),
        ("192.168.0.5", "192.168.0.5:80", 200),
        ("0.0.0.0", "192.168.0.5:80", 200),
        ("::", "[fe80::1]:80", 200),
        ("0.0.0.0", "evil.example", 400),
        ("0.0.0.0", "llm.example:443", 200),
        ("0.0.0.0", "LLM.example.", 200),
        ("0.0.0.0", "x.llm.example", 400),
    ],
)
def test_names(bound, host, status):
    assert ask(ServeConfig(host=bound, allowed_hosts=("llm.example",)), host=host)[0] == status


def test_bodies(monkeypatch):
    config = ServeConfig(max_body=10)
    assert ask(config, body=(b"01234", b"", b"56789"))[2] == b"0123456789"
    assert ask(config, body=(b"01234", b"567890"))[0] == 413
    assert ask(config, body=(b"x" * 50, b"x" * 50))[0] == 413
    assert ask(config, **{"content-length": "1000"})[0] == 413
    assert ask(config, **{"content-length": "-1"})[0] == 413
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    assert ask(config, body=())[0] == 408


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "a\nb"])
def test_keys_that_no_header_can_carry(key, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(key)
    with pytest.raises(ConfigError, match="expected a key"):
        read_api_key(tmp_path / "key")
    if key:
        monkeypatch.setenv("LLM_JAX_API_KEY", key)
        with pytest.raises(ConfigError, match="LLM_JAX_API_KEY: expected a key"):
            read_api_key(None)


def test_where_a_key_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("LLM_JAX_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("LLM_JAX_API_KEY", "from-the-environment")
    assert read_api_key(None) == "from-the-environment"
    (tmp_path / "key").write_text("from-a-file\n")
    assert read_api_key(tmp_path / "key") == "from-a-file"
