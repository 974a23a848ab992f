"""What stands before every request: who may ask, by which name, and how much.

- The Host header must be a name of this machine or one that was allowed. A page of somebody else's that lets
  its own name point here (DNS rebinding) is so refused, as it would else read whatever is served.
- With an API key, everything but the page itself and /health needs it. It is compared in constant time.
- A body is read here, whole, within a limit of bytes and seconds.

There is no CORS: other sites' scripts may not read answers. Bodies must be application/json, which such
scripts cannot send without asking first.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable

from llm_jax.serve.errors import ApiError
from llm_jax.serve.settings import ServeConfig

Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]

BODY_SECONDS = 30.0
_SKIPPED = (
    8  # times the limit is read and thrown away: a client that still writes does not read an answer
)
_LOCAL = ("localhost", "127.0.0.1", "::1")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """An ASGI application around another.

    open_paths: what needs no key, because nothing there depends on the model.
    """

    def __init__(self, app, config: ServeConfig, open_paths: frozenset[str]):
        self._app, self._config, self._open = app, config, open_paths
        self._key = None if config.api_key is None else f"Bearer {config.api_key}".encode()
        names = (*_LOCAL, config.host, *config.allowed_hosts)
        self._names = frozenset(name.strip("[]").lower() for name in names)
        # A number cannot be rebound to another one. Whoever listens on all has many.
        self._any_number = _is_unspecified(config.host)

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            self._check(scope)
            receive = await self._with_body(scope, receive)
        except ApiError as error:
            return await error.response()(scope, receive, send_with_headers)
        return await self._app(scope, receive, send_with_headers)

    def _check(self, scope: dict) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not self._is_ours(hosts[0].decode("latin-1")):
            raise ApiError(
                400, "the Host header names another machine: allow it by --allowed_host NAME",
                code="invalid_host",
            )  # fmt: skip
        if self._key is None or scope["path"] in self._open:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], self._key):
            message = "a key is needed, and this is none: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    def _is_ours(self, host: str) -> bool:
        name, separator, port = host.rpartition(":")
        if not separator or host.endswith("]"):
            name = host
        elif not port.isdigit():
            return False
        name = name.removeprefix("[").removesuffix("]").lower().removesuffix(".")
        if name in self._names:
            return True
        return self._any_number and _is_number(name)

    async def _with_body(self, scope: dict, receive: Receive) -> Receive:
        """A `receive` that gives the whole body at once."""
        most = self._config.max_body
        too_large = ApiError(413, f"the body is too large: at most {most} bytes are read here")
        for name, value in scope["headers"]:
            if name == b"content-length" and not (
                value.isdigit() and int(value[:20]) <= most * _SKIPPED
            ):
                raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its request was complete")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > most * _SKIPPED:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None
        if size > most:
            raise too_large
        first = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def replay() -> dict:
            nonlocal first
            if first is None:
                return await receive()
            message, first = first, None
            return message

        return replay


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_unspecified(host: str) -> bool:
    return _is_number(host) and ipaddress.ip_address(host).is_unspecified
