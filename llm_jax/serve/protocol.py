"""uvicorn's HTTP protocol with limits on what it has none for: requests that do not come, answers that are not read.

A connection that says nothing, sends a request byte by byte or does not read would else stay for ever; and
one header, or one trailer behind a body, without an end would fill the memory.
"""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 20.0
HEAD_BYTES = 1 << 19  # above what one read of a socket brings, bodies included: 1 << 18
MESSAGE_SECONDS = 40.0  # of a body; above the guard's BODY_SECONDS
READ_SECONDS = 60.0  # in which a client must read...
READ_BYTES = 1 << 16  # ...so much of what waits for it


class BoundedHeads(HttpToolsProtocol):
    """Closes a connection whose request is not complete in time, has too long headers, or is not read from."""

    _request_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    _bytes = 0  # since there was a part of a body, or an end of headers or of a request

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_request_timer()
        self._end_reader_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._bytes += len(data)
        if self._bytes > HEAD_BYTES:
            self._refuse("The headers are too long.")
        elif self._request_timer is None and self._is_answered:
            # The rest of a request that was refused, or an empty line: uvicorn has ended its timer.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @property
    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def on_message_begin(self) -> None:
        self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._bytes = 0
        self._begin_request_timer(MESSAGE_SECONDS, self._end_message)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bytes = 0
        self._end_request_timer()
        super().on_message_complete()

    def _begin_head(self) -> None:
        self._bytes = 0
        late = "The headers did not come in time."
        self._begin_request_timer(HEAD_SECONDS, lambda: self._refuse(late))

    def _begin_request_timer(self, seconds: float, end: Callable[[], None]) -> None:
        self._end_request_timer()
        self._request_timer = self.loop.call_later(seconds, end)

    def _end_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _end_message(self) -> None:
        if self.flow.read_paused:  # it waits for the answer to the request before, and is not late
            self._begin_request_timer(MESSAGE_SECONDS, self._end_message)
        else:
            self.transport.abort()

    def _refuse(self, why: str) -> None:
        self._end_request_timer()
        if not self.transport.is_closing():
            self.send_400_response(why)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin_reader_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._end_reader_timer()

    # A transport closes when all is read; what is little never pauses it.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._begin_reader_timer()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            super().timeout_keep_alive_handler()
            self._begin_reader_timer()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._begin_reader_timer()

    def _begin_reader_timer(self) -> None:
        self._end_reader_timer()
        unread = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(READ_SECONDS, self._end_unread, unread)

    def _end_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _end_unread(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < READ_BYTES:
            self.transport.abort()
        else:
            self._begin_reader_timer()
