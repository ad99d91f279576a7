"""POST a request and read a stream of server-sent events, with the standard library only."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

_MAX_ERROR_BYTES = 2000


class EventStreamError(Exception):
    """The server is unreachable, refuses, or sends an invalid reply; the message says which."""


class EventStream:
    """One request to a server, which another thread may abort.

    Args:
        url: http or https.
        api_key: sent as a bearer token.
        timeout_seconds: timeout of connecting, and between two events.
    """

    def __init__(self, url: str, api_key: str | None, timeout_seconds: float) -> None:
        self.is_aborted = False
        self._parts = urlsplit(url)
        connection = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self._connection = connection[self._parts.scheme](
            self._parts.netloc, timeout=timeout_seconds
        )
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._socket: socket.socket | None = None

    def post(self, body: Mapping[str, object]) -> Iterator[dict]:
        """Yield the JSON of every event, up to `[DONE]`.

        Raises:
            EventStreamError: see its description; also if it was aborted.
        """
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            if self.is_aborted:
                raise EventStreamError("aborted")
            self._connection.request("POST", self._parts.path, json.dumps(body), self._headers)
            response = self._connection.getresponse()
            if response.status != 200:
                said = response.read(_MAX_ERROR_BYTES).decode(errors="replace")
                raise EventStreamError(f"answered {response.status}: {' '.join(said.split())}")
            yield from _events(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EventStreamError(f"failed: {type(error).__name__} {error}".rstrip()) from None
        finally:
            self._connection.close()

    def abort(self) -> None:
        """Close the connection during a read, which then raises."""
        self.is_aborted = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _events(response: http.client.HTTPResponse) -> Iterator[dict]:
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
