"""The process in which the others meet, and in which jax's coordination service then runs.

`python -m llm_jax.sharding.coordinator` is started by process 0 (see distributed.py) and outlives it
for a while. Two things that jax does not do are the reason:

- jax starts its service inside process 0 and aborts every other process, with a C++ stack trace, the
  moment the service is gone. Here the service survives the death of process 0, long enough for the
  others to find out who is missing and to say so (training/peers.py).
- A process that cannot register in time is aborted by jax without a word about who is missing. So the
  processes meet first, on the same port, by one line each: `hello INDEX COUNT HOST`. The answer is
  `go`, or `no` and a reason. Then the port is handed over to the service.
"""

import argparse
import dataclasses
import errno
import os
import selectors
import signal
import socket
import sys
import threading
import time

# What we say on standard output: LISTENING, after BUSY if it took a while, or else what went wrong.
LISTENING, BUSY = "listening", "busy"
DONE = b"done\n"  # what process 0 writes to our standard input before it leaves as it should


class MeetingError(RuntimeError):
    """Not all processes met; the message is one line."""


@dataclasses.dataclass
class _Guest:
    connection: socket.socket
    received: bytes = b""
    index: int | None = None
    host: str = ""


class Meeting:
    """Waits until processes 0 .. count - 1 are connected to a listening socket."""

    def __init__(self, listener: socket.socket, count: int):
        self.count = count
        self._listener = listener
        self._guests: list[_Guest] = []
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self, timeout: float) -> None:
        """Answers every process once all are here, or once that cannot be any more.

        Raises:
          MeetingError: somebody did not come within `timeout` seconds, or does not belong here.
        """
        deadline = time.monotonic() + timeout
        try:
            while missing := self._missing():
                left = deadline - time.monotonic()
                if left <= 0:
                    names = ", ".join(map(str, missing[:20])) + ", ..." * (len(missing) > 20)
                    raise MeetingError(
                        f"process {names} of {self.count} did not come within {timeout:.0f} s"
                    )
                for key, _ in self._selector.select(left):
                    self._read(key.data) if key.data else self._accept()
        except MeetingError as error:
            self._answer(f"no {error}\n")
            raise
        self._answer("go\n")

    def _missing(self) -> list[int]:
        here = {guest.index for guest in self._guests}
        return [index for index in range(self.count) if index not in here]

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        guest = _Guest(connection)
        self._guests.append(guest)
        self._selector.register(connection, selectors.EVENT_READ, guest)

    def _read(self, guest: _Guest) -> None:
        try:
            data = guest.connection.recv(1024)
        except OSError:
            data = b""
        guest.received += data
        if not data or len(guest.received) > 1024:
            self._forget(guest)
        elif guest.index is None and guest.received.endswith(b"\n"):
            self._welcome(guest)

    def _forget(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        guest.connection.close()
        self._guests.remove(guest)

    def _welcome(self, guest: _Guest) -> None:
        words = guest.received.decode(errors="replace").split()
        if len(words) != 4 or words[0] != "hello" or not (words[1] + words[2]).isdigit():
            return self._forget(guest)
        index, count, guest.host = int(words[1]), int(words[2]), words[3]
        if count != self.count or index >= count:
            raise MeetingError(
                f"process {index} on {guest.host} counts {count} processes, process 0 counts "
                f"{self.count}: start all with the same number"
            )
        twin = next((other for other in self._guests if other.index == index), None)
        if twin is not None:
            raise MeetingError(
                f"two processes say they are process {index}, on {twin.host} and {guest.host}: "
                "give each its own number"
            )
        guest.index = index

    def _answer(self, line: str) -> None:
        for guest in list(self._guests):
            try:
                guest.connection.setblocking(True)
                guest.connection.sendall(line.encode())
            except OSError:
                pass  # it left; the heartbeats will tell
            self._forget(guest)
        self._selector.close()


def meet(address: str, index: int, count: int, host: str, timeout: float) -> None:
    """Reports to the meeting at `address` and waits for its answer.

    Raises:
      MeetingError: nobody answers there, or not all processes came.
    """
    name, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    reason = "nothing listens there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((name.strip("[]"), int(port)), timeout=5) as connection:
                connection.sendall(f"hello {index} {count} {host}\n".encode())
                # The coordinator knows the time limit; this one only bounds a host that vanished.
                connection.settimeout(max(deadline - time.monotonic(), 0) + 30)
                # The service of an earlier run, which lingers there, answers in its own protocol.
                answer = connection.makefile("rb").readline(1024).decode(errors="replace")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            answer = ""
        if answer == "go\n":
            return
        if answer.startswith("no "):
            raise MeetingError(answer.removeprefix("no ").strip())
        time.sleep(min(0.5, max(deadline - time.monotonic(), 0)))
    raise MeetingError(
        f"process {index} of {count} found no coordinator at {address} within {timeout:.0f} s "
        f"({reason}): does process 0 run there, and can this host reach that port?"
    )


def patience(linger: float) -> float:
    """For how many seconds we wait for the coordinator of an earlier run to free the port."""
    return linger + 15


def _listen(bind: str, seconds: float) -> socket.socket:
    """Listens; waits for `seconds` for a port that is in use, and says so."""
    deadline = time.monotonic() + seconds
    waits = False
    while True:
        try:
            return _bound(bind)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        if not waits:
            print(BUSY, flush=True)
            waits = True
        time.sleep(1)


def _bound(bind: str) -> socket.socket:
    name, _, port = bind.rpartition(":")
    name = name.strip("[]")
    if name in ("", "::") and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    family = socket.AF_INET6 if ":" in name and name != "::" else socket.AF_INET
    return socket.create_server(
        ("" if name == "::" else name, int(port)), family=family, backlog=1024
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llm_jax.sharding.coordinator")
    parser.add_argument("--bind", required=True, help="ADDRESS:PORT to listen on")
    parser.add_argument("--count", required=True, type=int, help="processes of the job")
    parser.add_argument("--timeout", required=True, type=float, help="seconds to wait for them")
    parser.add_argument("--heartbeat", required=True, type=int, help="jax's heartbeat, in seconds")
    parser.add_argument("--linger", required=True, type=float, help="seconds to outlive process 0")
    arguments = parser.parse_args()
    # Slurm sends SIGTERM to every process of a step, a terminal the others to every process of a
    # group, and this one is in the group of process 0; those that save need it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parent = _Parent()
    threading.Thread(target=parent.watch, daemon=True).start()
    try:
        listener = _listen(arguments.bind, patience(arguments.linger))
    except OSError as error:
        print((error.strerror or str(error)).partition(" (")[0].lower(), flush=True)
        sys.exit(1)
    print(LISTENING, flush=True)
    try:
        with listener:
            Meeting(listener, arguments.count).run(arguments.timeout)
    except MeetingError as error:
        sys.exit(str(error))
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(
        arguments.bind,
        arguments.count,
        heartbeat_timeout=arguments.heartbeat,
        # At their end all wait for each other, and jax aborts all of them when one takes longer:
        # process 0 may still be writing its report.
        shutdown_timeout=300,
    )
    parent.serves = True
    parent.gone.wait()
    if not parent.done:
        time.sleep(arguments.linger)
    service.shutdown()


class _Parent:
    """Process 0, which holds the other end of our standard input for as long as it lives."""

    def __init__(self):
        self.serves = self.done = False
        self.gone = threading.Event()

    def watch(self) -> None:
        self.done = DONE in sys.stdin.buffer.read()
        self.gone.set()
        if not self.serves:
            os._exit(1)  # nobody is left to meet


if __name__ == "__main__":
    main()
