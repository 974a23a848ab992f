"""Answers of a reply, whole or as a stream of server-sent events, that end when the client leaves.

Unlike Starlette's own streams these watch the connection without a task per message, and write all that is
there at once.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import Response

from llm_jax.serve.errors import ApiError
from llm_jax.serve.worker import Reply

FAILED = "llm_jax.failed"  # in a scope: the status that came too late for a stream's head
_PATIENCE = 5.0  # seconds
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies pass each token on
]


class Whole(Response):
    """One JSON text. make: waits for it; an ApiError becomes the answer."""

    def __init__(self, reply: Reply, make: Callable[[], Awaitable[bytes]]):
        super().__init__()
        self._reply, self._make = reply, make

    async def __call__(self, scope, receive, send) -> None:
        async with _Watched(self._reply, receive):
            try:
                status, body, headers = 200, await self._make(), _JSON
            except ApiError as error:
                failed = error.response()
                status, body, headers = error.status, error.body(), failed.raw_headers
            size = [(b"content-length", str(len(body)).encode())]
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            await send({"type": "http.response.start", "status": status, "headers": headers + size})
            await send({"type": "http.response.body", "body": body})


class Events(Response):
    """Server-sent events. chunks: their bytes; an ApiError becomes the last one."""

    def __init__(self, reply: Reply, chunks: AsyncIterator[bytes], *, end: bytes = b""):
        super().__init__()
        self._reply, self._chunks, self._end = reply, chunks, end

    async def __call__(self, scope, receive, send) -> None:
        async with _Watched(self._reply, receive):
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            try:
                # The reply tells when its time is over; this is for a client that does not even read that.
                async with asyncio.timeout_at(self._reply.deadline + _PATIENCE):
                    async for chunk in self._chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last = self._end
            except ApiError as error:
                scope[FAILED] = error.status
                last = b"data: " + error.body() + b"\n\n"
            except TimeoutError:
                scope[FAILED] = 504
                last = b""
            await send({"type": "http.response.body", "body": last})


class _Watched:
    """Drops the reply when the client leaves, and at the end whatever is left of it."""

    def __init__(self, reply: Reply, receive: Callable[[], Awaitable[dict]]):
        self._reply, self._receive = reply, receive

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._until_gone())

    async def __aexit__(self, *exception) -> None:
        self._task.cancel()
        self._reply.drop()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._reply.drop()
