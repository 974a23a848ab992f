"""Who may ask, what is limited, and how a server starts and ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.parse

import pytest
from servers import command, serving
from test_bad_input import GOOD, check

LONG = {
    "prompt": "a",
    "max_tokens": 500,
    "temperature": 0,
    "stream": True,
    "logit_bias": {"257": -100},
}


def raw(server, request: bytes) -> bytes:
    """What a server answers to these bytes."""
    address = urllib.parse.urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        connection.settimeout(5)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except TimeoutError:
            pass
    return b"".join(parts)


def start_stream(
    server, body, **headers
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    content = json.dumps(body)
    connection.request(
        "POST", "/v1/completions", content, {"content-type": "application/json", **headers}
    )
    return connection, connection.getresponse()


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST:80", "localhost."]
)
def test_names_of_this_machine(server, host):
    assert server.get("/health", host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "",
     "localhost:x", "localhost:80@evil.example", "evil.example#localhost"],
)  # fmt: skip
def test_other_names_are_refused(server, host):
    for path in ("/", "/health", "/v1/models"):
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert raw(server, request.encode()).startswith(b"HTTP/1.1 400"), host


def test_no_host_and_two_hosts(server):
    assert b" 400 " in raw(server, b"GET / HTTP/1.0\r\n\r\n").split(b"\r\n")[0]
    two = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert b" 400 " in raw(server, two).split(b"\r\n")[0]


def test_other_sites_get_nothing(server):
    origin = {"origin": "http://evil.example"}
    _, headers, _ = server.get("/v1/models", **origin)
    asked = {**origin, "access-control-request-method": "POST"}
    status, preflight, _ = server.ask("OPTIONS", "/v1/completions", None, **asked)
    assert status == 405
    for found in (headers, preflight):
        assert not [name for name in found if name.lower().startswith("access-control")]


def test_headers_of_the_page(server):
    status, headers, content = server.get("/")
    assert status == 200
    assert b"<script>" not in content
    assert b"://" not in content  # nothing from elsewhere
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_large_bodies(server):
    large = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    status, headers, content = server.post("/v1/completions", large)
    assert status == 413
    check(status, headers, content)
    chunked = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    part = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    assert b" 413 " in raw(server, chunked + part * 17 + b"0\r\n\r\n").split(b"\r\n")[0]
    with pytest.raises(ConnectionError):  # one that does not end is not read to its end
        raw(server, chunked + part * 2000)
    lying = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\nConnection: close\r\n\r\n"
    assert b" 413 " in raw(server, lying).split(b"\r\n")[0]
    assert server.post("/v1/completions", GOOD)[0] == 200


def test_heads_without_an_end(server):
    """Neither a long header nor many of them fill the memory."""
    for header in (b"X: " + b"a" * (1 << 20), b"X: y\r\n" * (1 << 18)):
        try:
            answer = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header)
        except ConnectionError:
            continue
        assert answer.startswith(b"HTTP/1.1 400")
    long = b"Host: localhost\r\nX: " + b"a" * 60_000 + b"\r\nConnection: close\r\n\r\n"
    assert b" 200 " in raw(server, b"GET /health HTTP/1.1\r\n" + long).split(b"\r\n")[0]


def cancelled(server) -> float:
    metrics = server.get("/metrics")[2].decode()
    return float(re.search(r"^llm_jax_cancelled_completions_total (\S+)", metrics, re.M)[1])


def test_a_client_that_leaves_frees_its_slot(server):
    connections = [start_stream(server, LONG)[0] for _ in range(8)]  # 4 slots
    health = server.health()
    assert health["open"] == health["running"] + health["waiting"]
    for connection in connections:
        connection.close()
    assert server.is_idle()
    # One that does not stream leaves too.
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.netloc)
    body = json.dumps({**LONG, "stream": False, "n": 8})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    end, before = time.monotonic() + 10, cancelled(server)
    while not server.health()["open"] and time.monotonic() < end:
        time.sleep(0.005)
    connection.close()
    assert server.is_idle()
    assert cancelled(server) == before + 8
    assert server.post("/v1/completions", GOOD)[0] == 200


def test_a_full_queue(server):
    connections = [start_stream(server, {**LONG, "n": 8})[0] for _ in range(4)]  # 32 places
    status, headers, content = server.post("/v1/completions", GOOD)
    assert status == 429
    assert headers["retry-after"] == "1"
    check(status, headers, content)
    for connection in connections:
        connection.close()
    assert server.is_idle()


@pytest.mark.slow
def test_a_key_a_time_limit_and_names(chat_run, tmp_path):
    """One server for all three, since each start takes seconds."""
    key = "sesame-open-5f2c"
    (tmp_path / "key").write_text(key + "\n")
    flags = ("--api_key_file", tmp_path / "key", "--timeout", 3, "--allowed_host", "llm.example",
             "--max_tokens", 505, "--num_slots", 1)  # fmt: skip
    with serving("--workdir", chat_run, *flags) as server:
        for path in ("/", "/page.js", "/health"):
            assert server.get(path)[0] == 200
        for path in ("/v1/models", "/metrics", "/api/about", "/openapi.json", "/nowhere"):
            for wrong in ({}, {"authorization": key}, {"authorization": f"Bearer {key}x"},
                          {"authorization": "Bearer "}, {"authorization": "Bearer \xe9"}):  # fmt: skip
                found = server.get(path, **wrong)
                assert found[0] == 401, (path, wrong)
                assert key not in check(*found)
        right = {"authorization": f"Bearer {key}"}
        assert server.get("/v1/models", host="llm.example:99", **right)[0] == 200
        assert server.get("/v1/models", host="other.example", **right)[0] == 400
        status, headers, content = server.post(
            "/v1/completions", {**GOOD, "max_tokens": 506}, **right
        )
        assert status == 400
        assert "506 is above 505" in check(status, headers, content)

        server.post(
            "/v1/completions", {**LONG, "stream": False, "max_tokens": 3}, **right
        )  # compiles
        many = {**LONG, "n": 60}
        status, _, content = server.post("/v1/completions", {**many, "stream": False}, **right)
        assert status == 504
        assert json.loads(content)["error"]["type"] == "timeout_error"
        _, response = start_stream(server, many, **right)
        told = response.read().decode().strip().split("\n\n")
        assert json.loads(told[-1][6:])["error"]["type"] == "timeout_error"
        assert server.is_idle()

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert key not in server.process.stdout.read() + server.process.stderr.read()


@pytest.mark.slow
def test_the_end(chat_run):
    """What runs goes on, what comes is told; then what is left is told too."""
    with serving("--workdir", chat_run, "--drain", 1.5, "--num_slots", 1) as server:
        server.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 3})  # compiles
        results = {}

        def read(name, body):
            results[name] = start_stream(server, body)[1].read().decode().strip().split("\n\n")

        bodies = {"short": {**LONG, "max_tokens": 200}, "long": {**LONG, "n": 60}}
        threads = [threading.Thread(target=read, args=item) for item in bodies.items()]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        idle = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
        idle.request("GET", "/health")
        idle.getresponse().read()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, _, content = server.post("/v1/completions", GOOD)
        assert status == 503
        assert "stopping" in json.loads(content)["error"]["message"]
        for thread in threads:
            thread.join(20)
        assert results["short"][-1] == "data: [DONE]"
        assert "stopping" in json.loads(results["long"][-1][6:])["error"]["message"]
        idle.close()
        assert server.process.wait(20) == 0
        assert server.process.stderr.read() == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "expected one of --workdir DIR and --hf FOLDER"),
        (("--workdir", "nowhere"), "no checkpoints at"),
        (("--hf", "nowhere"), "there is no folder nowhere"),
        (("--hf", "."), "there is no tokenizer.json in ."),
        (("--workdir", "x", "--hf", "y"), "expected one of"),
        (("--workdir", "x", "--port", "70000"), "--port 70000 must lie in"),
        (("--workdir", "x", "--num_slots", "0"), "--num_slots 0 must be at least 1"),
        (("--workdir", "x", "--timeout", "nan"), "--timeout nan must be above 0"),
        (("--workdir", "x", "--drain", "inf"), "--drain inf must be at least 0, and finite"),
        (("--workdir", "x", "--host", "no.such.host.invalid"), "there is no such address"),
        (
            ("--workdir", "x", "--api_key_file", "pyproject.toml"),
            "expected a key of printable ASCII",
        ),
        (("--workdir", "x", "--prot", "1"), "unknown flag '--prot'"),
    ],
)
def test_errors_before_the_model_is_loaded(monkeypatch, capsys, flags, message):
    """In this process: importing jax takes longer than all of them."""
    from llm_jax.core import flags as entry
    from llm_jax.serve import __main__ as serve

    monkeypatch.setattr("sys.argv", ["serve", *flags])
    with pytest.raises(SystemExit) as error:
        entry.run_entry(serve.main)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_taken_port_is_told_before_the_model_is_loaded(monkeypatch, chat_run):
    from llm_jax.core import flags as entry
    from llm_jax.serve import __main__ as serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serve", "--workdir", str(chat_run), "--port", str(port)])
        with pytest.raises(
            SystemExit, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"
        ):
            entry.run_entry(serve.main)


def test_a_missing_package_names_the_extra(monkeypatch):
    from llm_jax.core import flags as entry
    from llm_jax.serve import __main__ as serve

    find = serve.importlib.util.find_spec
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    monkeypatch.setattr("sys.argv", ["serve", "--workdir", "x"])
    with pytest.raises(SystemExit, match="serving needs uvicorn: pip install"):
        entry.run_entry(serve.main)


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(chat_run):
    with serving("--workdir", chat_run, "--num_slots", 1) as server:
        start_stream(server, {**LONG, "n": 60})
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert server.process.wait(5) == 130


@pytest.mark.slow
def test_one_line_as_a_process(tmp_path):
    found = subprocess.run(
        command("--workdir", tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: no checkpoints at")
    assert found.stderr.count("\n") == 1
