"""Streams end with their client, whenever it leaves."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Iterator

import pytest
from fastapi import Request
from starlette.types import Message

from phi4.serve.api_errors import ApiError
from phi4.serve.responses import streamed, unless_client_leaves

SCOPE = {
    **{"type": "http", "method": "GET", "path": "/", "headers": []},
    "asgi": {"version": "3.0", "spec_version": "2.3"},
}


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    """What only the garbage collector ends has not ended."""
    gc.disable()
    yield
    gc.enable()


class Client:
    """Takes some messages and leaves; further ones are stuck for ever."""

    def __init__(self, num_messages: int) -> None:
        self.left, self._num_wanted = asyncio.Event(), num_messages
        self.got: list[Message] = []

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.got) == self._num_wanted:
            self.left.set()
            await asyncio.Event().wait()
        self.got.append(message)


class Lines:
    """Numbers for ever.

    Attributes:
        is_closed: whether somebody ended them.
    """

    def __init__(self) -> None:
        self.is_closed = False

    async def read(self) -> AsyncGenerator[bytes, None]:
        try:
            for number in range(1 << 30):
                yield b"%d" % number
        finally:
            self.is_closed = True


@pytest.mark.parametrize("num_messages", range(4))
def test_lines_are_closed_whenever_the_client_leaves(num_messages: int) -> None:
    async def run() -> None:
        client, lines = Client(num_messages), Lines()
        response = await streamed(Request(SCOPE, client.receive), lines.read(), "text/plain")
        await response(SCOPE, client.receive, client.send)
        assert lines.is_closed
        # The first message has the status.
        assert [m["body"] for m in client.got[1:]] == [b"%d" % i for i in range(num_messages - 1)]

    asyncio.run(run())


def test_lines_are_closed_where_the_client_left_before_the_first() -> None:
    is_closed = False

    async def silent() -> AsyncGenerator[bytes, None]:
        nonlocal is_closed
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            is_closed = True

    async def run() -> None:
        client = Client(0)
        client.left.set()
        with pytest.raises(ApiError, match="the client closed the connection"):
            await streamed(Request(SCOPE, client.receive), silent(), "text/plain")
        assert is_closed

    asyncio.run(run())


def test_result_of_a_client_that_stays_is_given_and_what_it_waits_for_may_fail() -> None:
    async def work(number: int) -> float:
        return 1 / number

    async def run(number: int) -> float:
        return await unless_client_leaves(Request(SCOPE, Client(0).receive), work(number))

    assert asyncio.run(run(2)) == 0.5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run(0))
