"""A small OpenAI-compatible server on loopback, over a scripted sampler."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = Callable[[str, dict], Iterator[dict | bytes]]
"""Path and body to what is sent: events, or bytes as they are."""


class EndpointServer(ThreadingHTTPServer):
    """Answers every POST by a reply, and remembers what it was asked.

    Attributes:
        asked: (path, body, authorization) of every request.
        closed_early: an item for every client that left before the end.
    """

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), _EndpointHandler)
        self.reply = reply
        self.asked: list[tuple[str, dict, str | None]] = []
        self.closed_early: queue.SimpleQueue[str] = queue.SimpleQueue()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _EndpointHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        if body["model"] == "unknown":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in self.server.reply(self.path, body):
                raw = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode()
                self.wfile.write(b"%x\r\n%s\n\n\r\n" % (len(raw) + 2, raw))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.closed_early.put(self.path)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(reply: Reply) -> Iterator[EndpointServer]:
    with EndpointServer(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
