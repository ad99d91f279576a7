"""Clients of a server's `/v1/completions` of every manner: patient, hasty, slow, and broken ones.

They speak HTTP over plain sockets, so that a client can be as slow or as rude as it likes.
"""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_SMALL_BUFFER_BYTES = 4096
_TOKEN_COUNTS = (8, 32, 64)
"""New tokens of patient streams."""
_PATIENCE_SECONDS = 120.0
"""What a client waits for the next bytes before it calls the server hung."""


class Server(NamedTuple):
    """Where a server listens, and what its model is called."""

    host: str
    port: int
    model: str


@dataclass
class Times:
    """What clients saw.

    Attributes:
        first: seconds from each request to its first token.
        between: seconds between two tokens.
        errors: what went wrong, by its text.
        num_requests: that were sent and answered to their end.
        num_tokens: tokens of those.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_tokens: int = 0


class ServerFaultError(Exception):
    """The server answered what it should not have."""


async def stream_ids(server: Server, body: dict[str, Any]) -> AsyncIterator[list[int]]:
    """New token ids of one prompt as they come.

    Raises:
        ServerFaultError: no 200, an error in the stream, or an end before its end.
    """
    async with _sent(server, _post(server, body | {"stream": True})) as reader:
        await _expect_ok(reader)
        while line := await _line(reader):
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return
            said = json.loads(line[len(b"data: ") :])
            if "error" in said:
                raise ServerFaultError(f"error in the stream: {said['error']['message']}")
            yield [i for choice in said["choices"] for i in choice.get("token_ids") or ()]
        raise ServerFaultError("the stream broke off")


async def ids_of(server: Server, body: dict[str, Any]) -> list[int]:
    """Return all new token ids of one prompt."""
    return [i async for ids in stream_ids(server, body) for i in ids]


async def timed(server: Server, body: dict[str, Any], times: Times) -> None:
    """One streamed request to its end."""
    last, is_first = time.perf_counter(), True
    try:
        async for ids in stream_ids(server, body):
            if ids:
                now = time.perf_counter()
                (times.first if is_first else times.between).append(now - last)
                last, is_first = now, False
                times.num_tokens += len(ids)
        times.num_requests += 1
    except (ServerFaultError, OSError, asyncio.IncompleteReadError, TimeoutError) as error:
        times.errors[f"{type(error).__name__}: {error}"] += 1


async def fetch(server: Server, path: str) -> str:
    """Return the body of a page that the server answers with 200.

    Raises:
        ServerFaultError: it does not.
    """
    head = f"GET {path} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n\r\n"
    async with _sent(server, head.encode()) as reader:
        await _expect_ok(reader)
        while (await _line(reader)).strip():
            pass
        return (await asyncio.wait_for(reader.read(), _PATIENCE_SECONDS)).decode()


def random_body(server: Server, draws: random.Random, max_tokens: int) -> dict[str, Any]:
    """Return a request whose answer has that many tokens."""
    return {
        "model": server.model,
        "prompt": "".join(draws.choices("the quick brown fox ", k=draws.randrange(1, 60))),
        "max_tokens": max_tokens,
        "seed": draws.randrange(1 << 31),
        "ignore_eos": True,
        "return_token_ids": True,
    }


MANNERS = {"whole": 40, "leaves": 25, "slow": 12, "half header": 8, "half body": 8, "silent": 7}
"""What a client does, and how often: reads all; leaves after some tokens; reads a little now and
then; sends half a header or half a body and stays; sends a request, reads nothing and stays."""


class RudeClients:
    """Requests of random manners. Who stays does so until `leave`, and some go without goodbye.

    Args:
        server: that they ask.
        max_tokens: maximum tokens of an answer.
        times: of clients that read everything.
    """

    def __init__(self, server: Server, max_tokens: int, times: Times) -> None:
        self._server, self._max_tokens, self._times = server, max_tokens, times
        self._staying: list[socket.socket] = []
        self.counts: Counter[str] = Counter()

    async def ask(self, draws: random.Random, count: int, at_once: int) -> None:
        """Send requests with limited concurrency."""
        [*manners] = draws.choices(list(MANNERS), list(MANNERS.values()), k=count)
        seeds = iter([(manner, draws.randrange(1 << 31)) for manner in manners])

        async def work() -> None:
            for manner, seed in seeds:
                self.counts[manner] += 1
                await self._ask(manner, random.Random(seed))

        await asyncio.gather(*(work() for _ in range(at_once)))

    def leave(self, draws: random.Random) -> None:
        """Close what stayed, half of it by a reset."""
        for client in self._staying:
            if draws.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
        self._staying.clear()

    async def _ask(self, manner: str, draws: random.Random) -> None:
        body = random_body(self._server, draws, draws.randrange(1, self._max_tokens + 1))
        match manner:
            case "whole":
                await timed(self._server, body, self._times)
            case "leaves":
                await self._leave_after(body, draws.randrange(self._max_tokens))
            case "slow":
                await self._read_slowly(body, draws)
            case _:
                await self._stay(manner, body, draws)

    async def _leave_after(self, body: dict[str, Any], num_tokens: int) -> None:
        async with AsyncExitStack() as stack:
            stream = stream_ids(self._server, body)
            stack.push_async_callback(stream.aclose)
            async for ids in stream:
                num_tokens -= len(ids)
                if num_tokens < 0:
                    return

    async def _read_slowly(self, body: dict[str, Any], draws: random.Random) -> None:
        message = _post(self._server, body | {"stream": True})
        async with _sent(self._server, message, is_slow=True) as reader:
            while await asyncio.wait_for(reader.read(200), _PATIENCE_SECONDS):
                await asyncio.sleep(0.01 * draws.random())

    async def _stay(self, manner: str, body: dict[str, Any], draws: random.Random) -> None:
        whole = _post(self._server, body | {"stream": draws.random() < 0.7})
        head, _, content = whole.partition(b"\r\n\r\n")
        sent = {
            "half header": head[: draws.randrange(len(head))],
            "half body": head + b"\r\n\r\n" + content[: draws.randrange(len(content))],
            "silent": whole,
        }[manner]
        client = _small_socket()
        self._staying.append(client)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (self._server.host, self._server.port))
        await loop.sock_sendall(client, sent)


async def keep_asking(
    server: Server, streams: int, is_over: Callable[[], bool], times: Times, seed: int = 0
) -> None:
    """Streams that ask again as soon as they are answered, until all is over."""

    async def stream(index: int) -> None:
        draws = random.Random(seed * 1000 + index)
        while not is_over():
            await timed(server, random_body(server, draws, draws.choice(_TOKEN_COUNTS)), times)

    await asyncio.gather(*map(stream, range(streams)))


def _post(server: Server, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@asynccontextmanager
async def _sent(
    server: Server, message: bytes, *, is_slow: bool = False
) -> AsyncIterator[asyncio.StreamReader]:
    """The answer to a message; the connection is closed behind the block."""
    client = _small_socket() if is_slow else _socket()
    await asyncio.get_running_loop().sock_connect(client, (server.host, server.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1 << 20)
    try:
        writer.write(message)
        await writer.drain()
        yield reader
    finally:
        writer.close()


def _socket() -> socket.socket:
    client = socket.socket()
    client.setblocking(False)
    return client


def _small_socket() -> socket.socket:
    """One that takes little of an answer before it is read."""
    client = _socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
    return client


async def _line(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readline(), _PATIENCE_SECONDS)


async def _expect_ok(reader: asyncio.StreamReader) -> None:
    status = await _line(reader)
    if status.split()[1:2] != [b"200"]:
        rest = await asyncio.wait_for(reader.read(), _PATIENCE_SECONDS)
        raise ServerFaultError(f"{status.decode().strip()}: {rest[-200:].decode(errors='replace')}")
