"""HTTP connections that are closed if their client is inactive.

uvicorn waits indefinitely for the rest of a request, and for the reader of an answer. Both cost
memory and a file descriptor, and an unread answer accumulates tokens; here a connection is closed,
and its request cancelled, if either takes too long.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class ConnectionLimits:
    """Timeouts of inactive clients.

    Attributes:
        request_seconds: from the connection, or the first byte of a later request, to the end of
            the request's body.
        unread_seconds: from the moment that the client's and this machine's buffers are full until
            they have space again.
        closing_seconds: time to write answers once the server is ending.
    """

    request_seconds: float = 60.0
    unread_seconds: float = 60.0
    closing_seconds: int = 2


class LimitedConnection(H11Protocol):
    """One connection, as uvicorn makes it.

    Args:
        limits: limits of this connection.
        given: arguments that uvicorn passes to its protocols.
    """

    def __init__(self, limits: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._request_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        of_tcp = cast(asyncio.Transport, transport)
        super().connection_made(of_tcp)
        # Writing pauses as soon as the machine's own buffer is full, and resumes when all is sent.
        of_tcp.set_write_buffer_limits(high=0)
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """A part of the next request may have arrived already."""
        super().on_response_complete()
        self._watch_request()

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self._limits.unread_seconds, self._cut_off)

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        super().resume_writing()
        _cancel(self._unread_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        _cancel(self._request_timer)
        _cancel(self._unread_timer)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Shut down; incomplete requests are not waited for."""
        super().shutdown()
        if self._is_request_half_sent():
            self._cut_off()
        else:
            self.loop.call_later(self._limits.closing_seconds, self._cut_off)

    def _is_request_half_sent(self) -> bool:
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY

    def _watch_request(self) -> None:
        """Start the timer of a request at its first byte, and stop it at its last one."""
        if not self._is_request_half_sent():
            _cancel(self._request_timer)
            self._request_timer = None
        elif self._request_timer is None:
            seconds = self._limits.request_seconds
            self._request_timer = self.loop.call_later(seconds, self._cut_off)

    def _cut_off(self) -> None:
        # Not close(), which would first write data that the client does not read.
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
