"""The protocol itself, with limits of about a second in place of minutes."""

import asyncio
import contextlib

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from llm_jax.serve import protocol
from llm_jax.serve.start import loop_factory

pytestmark = pytest.mark.slow  # limits that a busy machine does not reach by itself take their time

LARGE = 1 << 25  # more than a connection holds of what is not read
POST = b"POST /refused HTTP/1.1\r\nHost: a\r\n"


async def app(scope, receive, send):
    """Answers without reading; to /body after it read all, to /slow after a while."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1.2)
    more = scope["path"] == "/body"
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    body = b"x" * LARGE if scope["path"] == "/large" else b"ok"
    await send({"type": "http.response.body", "body": body, "more_body": scope["path"] == "/large"})
    if scope["path"] == "/large":
        await send({"type": "http.response.body", "body": b"end"})


class Server:
    def __init__(self, port, state):
        self._port, self._state = port, state

    @contextlib.asynccontextmanager
    async def connected(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        yield reader, writer
        writer.transport.abort()

    async def ask(self, *parts, wait=0.0):
        """All that comes until the server ends the connection."""
        async with self.connected() as (reader, writer):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(wait)
            return await asyncio.wait_for(self._read(reader), 20)

    async def _read(self, reader):
        """A connection that is reset has ended, too."""
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(1 << 16):
                found += part
        return found

    async def is_empty(self):
        """Whether no connection and no task is left, soon."""
        for _ in range(400):
            if not (self._state.connections or self._state.tasks):
                return True
            await asyncio.sleep(0.02)
        return False


@pytest.fixture(params=sorted({"asyncio", "served"} if loop_factory() else {"asyncio"}))
def run(request):
    """Runs `test(server)` in asyncio's loop, and in that of servers where it is another."""

    async def main(test):
        config, state = Config(app, log_level="critical", lifespan="off"), ServerState()
        config.timeout_keep_alive = 0.1
        config.load()
        make = lambda: protocol.BoundedHeads(config=config, server_state=state, app_state={})  # noqa: E731
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        found = Server(server.sockets[0].getsockname()[1], state)
        await test(found)
        assert await found.is_empty()
        server.close()

    def in_loop(test):
        with asyncio.Runner(
            loop_factory=loop_factory() if request.param == "served" else None
        ) as runner:
            runner.run(main(test))

    return in_loop


def test_heads_that_do_not_come(run, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)

    async def test(server):
        good = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        assert (await server.ask(good)).endswith(b"ok\r\n0\r\n\r\n")
        assert b"in time" in await server.ask()
        assert b"in time" in await server.ask(*[b"G", b"E", b"T", b" ", b"/"], wait=0.02)

    run(test)


def test_bodies_that_do_not_come(run, monkeypatch):
    """Behind an answer, and before one; whether nothing, a part or all comes once the answer is there."""
    monkeypatch.setattr(protocol, "MESSAGE_SECONDS", 1.0)
    head = POST + b"Content-Length: 3\r\n\r\n"

    async def test(server):
        for rest in ((), (b"y",), (b"yz",), (b"yz", b"\r\n")):
            assert b" 200 " in await server.ask(head + b"x", *rest, wait=0.03)
        assert await server.ask(head.replace(b"/refused", b"/body"), b"x", wait=0.05) == b""

    run(test)


def test_a_body_behind_a_request_that_still_runs_is_not_late(run, monkeypatch):
    monkeypatch.setattr(protocol, "MESSAGE_SECONDS", 0.6)

    async def test(server):
        first = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
        second = POST + b"Content-Length: 3\r\n\r\n"
        assert (await server.ask(first + second, b"xyz", wait=0.05)).count(b" 200 ") == 2
        upgrade = first[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"
        assert (await server.ask(upgrade)).count(b" 200 ") == 1

    run(test)


def test_trailers_without_an_end(run, monkeypatch):
    monkeypatch.setattr(protocol, "MESSAGE_SECONDS", 1.0)
    head = POST.replace(b"/refused", b"/body") + b"Transfer-Encoding: chunked\r\n"
    chunks = b"10000\r\n" + b"a" * 65536 + b"\r\n"

    async def test(server):
        close = b"Connection: close\r\n\r\n"
        good = head + close + chunks * 32 + b"0\r\nX: y\r\n\r\n"
        assert b" 200 " in await server.ask(good)
        start = head + b"\r\n" + chunks + b"0\r\n"
        for many in (b"X: y\r\n" * (1 << 17), b"X: " + b"a" * (1 << 20)):
            with contextlib.suppress(ConnectionError):
                assert b"too long" in await server.ask(start + many)
        assert await server.ask(start, *[b"X: y\r\n"] * 3, wait=0.03) == b""

    run(test)


def test_a_client_that_does_not_read(run, monkeypatch):
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.8)

    async def test(server):
        for header in (b"", b"Connection: close\r\n"):
            async with server.connected() as (_, writer):
                writer.transport.pause_reading()
                writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n")
                await asyncio.sleep(0.05)
                assert await server.is_empty()

    run(test)


def test_a_client_that_reads_slowly_gets_all(run, monkeypatch):
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.8)

    async def test(server):
        async with server.connected() as (reader, writer):
            writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            size = 0
            while part := await reader.read(1 << 22):
                size += len(part)
                await asyncio.sleep(0.002)
            assert size > LARGE

    run(test)
