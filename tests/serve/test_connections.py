"""Clients that do nothing: half-open sockets, half requests and unread answers end, others go on.

Every limit that a test waits for is short, and what a slow machine must still do in time has none.
"""

import socket
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from unittest.mock import Mock, call
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from uvicorn import Config
from uvicorn.server import ServerState

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling import protocol
from phi4.serve.connections import ConnectionLimits, LimitedConnection
from phi4.serve.responses import streamed
from phi4.serve.traffic import Traffic
from phi4.serve.web_server import listen, serving
from tests.support.unhurried import UnhurriedSampler
from tests.support.waiting import LONG_SECONDS, wait_until

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
SOON = 0.05
HALF_HEADER = b"POST /read HTTP/1.1\r\nHost: x\r\nContent-"
HALF_BODY = HALF_HEADER + b"Length: 9\r\n\r\n{"
WHOLE = HALF_BODY[:-1].replace(b"9", b"2") + b"[]"
TALK = b"GET /talk HTTP/1.1\r\nHost: x\r\n\r\n"
SMALL_BUFFER_BYTES = 4096


@contextmanager
def server(limits: ConnectionLimits) -> Iterator[tuple[int, Traffic, UnhurriedSampler]]:
    """Its port, over a model that says the same letter for ever, 10,000 times per token."""
    sampler = UnhurriedSampler(lambda ids: {65: 1.0}, TOKENIZER)
    traffic, app = Traffic("weights", max_open=8, drain_seconds=0.0), FastAPI()

    @app.post("/read")
    async def read(numbers: list[int]) -> int:
        return sum(numbers)

    @app.get("/talk")
    async def talk(request: Request) -> StreamingResponse:
        async def lines() -> AsyncGenerator[bytes, None]:
            asked = protocol.Request(prompt=(1,), max_tokens=1 << 30)
            async for _ in traffic.ask([asked]):
                yield b"A" * 10_000

        return await streamed(request, lines(), "text/plain")

    listener = listen("127.0.0.1", 0)
    # What is accepted has it too, so that little is written before the client has to read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
    thread = threading.Thread(target=traffic.run, args=(sampler,))
    thread.start()
    try:
        with serving(app, listener, limits):
            yield listener.getsockname()[1], traffic, sampler
    finally:
        traffic.drain()
        thread.join()


def connected(port: int, sent: bytes = b"") -> socket.socket:
    """A client that reads little before its buffer is full."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    client.settimeout(LONG_SECONDS)
    client.connect(("127.0.0.1", port))
    client.sendall(sent)
    return client


def is_cut_off(client: socket.socket) -> bool:
    """Waits for it."""
    with suppress(ConnectionError):
        while client.recv(1 << 16):
            pass
    return True


def answer_to(client: socket.socket) -> bytes:
    """To a request with `Connection: close`."""
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.mark.parametrize("sent", [b"", HALF_HEADER, HALF_BODY], ids=["nothing", "header", "body"])
def test_half_a_request_is_cut_off_in_time(sent: bytes) -> None:
    limits = ConnectionLimits(request_seconds=SOON)
    with server(limits) as (port, _, _), closing(connected(port, sent)) as client:
        assert is_cut_off(client)


class Loop:
    """Notes the timers, and runs nothing."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Mock]] = []

    def call_later(self, seconds: float, _: object) -> Mock:
        self.timers.append((seconds, Mock()))
        return self.timers[-1][1]

    def create_task(self, work: Coroutine) -> Mock:
        work.close()
        return Mock()

    def running(self) -> list[float]:
        """Seconds of the timers that nobody cancelled."""
        return [seconds for seconds, timer in self.timers if not timer.cancel.called]


def test_timer_runs_from_the_first_byte_of_a_request_to_its_last() -> None:
    config, loop = Config(FastAPI(), timeout_keep_alive=7, log_level="warning"), Loop()
    limits = ConnectionLimits(request_seconds=3.0, unread_seconds=5.0)
    connection = LimitedConnection(
        limits, config=config, server_state=ServerState(), app_state={}, _loop=loop
    )
    transport = Mock(**{"get_extra_info.return_value": None, "is_closing.return_value": False})
    connection.connection_made(transport)
    # Or the rest of an answer would not pause, and have no timer.
    assert transport.set_write_buffer_limits.call_args == call(high=0)
    for letter in WHOLE:
        assert loop.running() == [3.0]
        connection.data_received(bytes([letter]))
    assert (loop.running(), len(loop.timers)) == ([], 1)
    # The answer, behind which the next request has begun.
    connection.data_received(HALF_HEADER)
    assert loop.running() == []
    for message in (
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]},
        {"type": "http.response.body", "body": b"1"},
    ):
        with pytest.raises(StopIteration):
            connection.cycle.send(message).send(None)
    # The first is uvicorn's own, of connections that are kept for more requests.
    assert loop.running() == [7, 3.0]
    connection.pause_writing()
    assert loop.running() == [7, 3.0, 5.0]
    connection.resume_writing()
    assert loop.running() == [7, 3.0]
    connection.connection_lost(None)
    assert loop.running() == []


def test_whole_requests_have_no_limit_and_half_ones_block_nobody() -> None:
    limits = ConnectionLimits(request_seconds=LONG_SECONDS, unread_seconds=LONG_SECONDS)
    with server(limits) as (port, _, _), ExitStack() as clients:
        for index in range(30):
            sent = (b"", HALF_HEADER, HALF_BODY)[index % 3]
            clients.enter_context(closing(connected(port, sent)))
        url, headers = f"http://127.0.0.1:{port}/read", {"Content-Type": "application/json"}
        with urlopen(HttpRequest(url, b"[2, 3]", headers), timeout=LONG_SECONDS) as answer:
            assert answer.read() == b"5"


def test_unread_answer_is_cut_off_and_its_request_cancelled() -> None:
    limits = ConnectionLimits(LONG_SECONDS, unread_seconds=SOON)
    with server(limits) as (port, traffic, sampler), closing(connected(port, TALK)) as client:
        wait_until(lambda: traffic.counts.cancelled == 1, "the request is cancelled")
        wait_until(lambda: not traffic.num_open, "nobody waits for it")
        assert not sampler._open
        assert is_cut_off(client)


def test_client_that_reads_is_not_cut_off_and_one_that_leaves_frees_its_request() -> None:
    limits = ConnectionLimits(request_seconds=LONG_SECONDS, unread_seconds=LONG_SECONDS)
    with server(limits) as (port, traffic, sampler):
        with closing(connected(port, TALK)) as client:
            num_read = 0
            while num_read < 300_000:
                num_read += len(client.recv(1 << 16))
            assert traffic.num_open == 1
        wait_until(lambda: traffic.counts.cancelled == 1, "the request is cancelled")
        assert not sampler._open


def test_shutdown_waits_for_no_client_that_does_nothing(capfd) -> None:
    limits = ConnectionLimits(LONG_SECONDS, LONG_SECONDS, closing_seconds=0)
    with ExitStack() as clients:
        with server(limits) as (port, traffic, _):
            for sent in (b"", HALF_HEADER, HALF_BODY, TALK):
                clients.enter_context(closing(connected(port, sent)))
            wait_until(lambda: traffic.num_open, "the request is open")
        assert (traffic.num_open, traffic.counts.cancelled) == (0, 1)
    # Nothing that looks like a fault of the server.
    assert capfd.readouterr().err == ""
