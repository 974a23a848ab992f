"""One server, from its port to its end.

SIGTERM and Ctrl-C: nothing new is taken, what runs has `drain` seconds, then it is told; a second one ends at
once. The port is taken before the model is loaded, so that a wrong one is known at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.serve.app import make_app
from llm_jax.serve.protocol import BoundedHeads
from llm_jax.serve.service import Service
from llm_jax.serve.settings import ServeConfig

_CONNECTIONS = 1024
_LAST_WORDS = 5  # seconds to send what requests are told at the end


def take_port(config: ServeConfig) -> socket.socket:
    """A socket that will listen there.

    Raises:
      ConfigError: a host that is none of this machine.
      RunError: a port that is taken, or that needs other rights.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host {config.host}: there is no such address") from None
    family, kind, protocol, _, address = found[0]
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise RunError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}; choose by --port"
        ) from None
    return taken


async def run(service: Service, listening: socket.socket, say: Callable[[str], None]) -> None:
    """Serves until a signal comes. The service's worker runs already, and is closed here."""
    server = _Server(
        uvicorn.Config(
            make_app(service), log_level="error", access_log=False, server_header=False, http=BoundedHeads, ws="none",
            lifespan="off", limit_concurrency=_CONNECTIONS, timeout_keep_alive=30,
            timeout_graceful_shutdown=int(service.config.drain) + _LAST_WORDS,
        )
    )  # fmt: skip
    loop, draining = asyncio.get_running_loop(), []

    def stop(number: int) -> None:
        if draining:
            os._exit(128 + number)  # at once: a program that is being compiled would be waited for
        draining.append(asyncio.ensure_future(_drain(server, service)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    server.ready = lambda: say(f"serving {service.about.name} at http://{shown}:{port}")
    try:
        await server.serve([listening])
    finally:
        await service.worker.close()
        service.insight.close()


async def _drain(server: "_Server", service: Service) -> None:
    service.worker.refuse("the server is stopping")
    # Not yet `should_exit`, with which connections close: a client that asks now is to be told.
    await service.worker.drained(service.config.drain)
    server.should_exit = True


class _Server(uvicorn.Server):
    """Leaves signals to `run`. ready: called once it listens."""

    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def quiet_logs() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
