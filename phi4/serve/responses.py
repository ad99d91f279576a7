"""Error responses, and responses that detect when the client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from phi4.serve.api_errors import ApiError

_Result = TypeVar("_Result")

_CLIENT_CLOSED_REQUEST = 499


def error_response(path: str, error: ApiError) -> Response:
    """Return an error in the format of the API that the path belongs to."""
    is_ollama = path.startswith("/api/")
    body = error.ollama_form() if is_ollama else error.openai_form()
    headers = {} if error.retry_seconds is None else {"Retry-After": str(error.retry_seconds)}
    # In ASCII: a message may quote half of a surrogate pair, which has no UTF-8 encoding.
    return Response(json.dumps(body), error.status, headers, "application/json")


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of some work, which is cancelled if the client closes the connection.

    Args:
        request: a request whose body has been read.
        work: the work for the client.

    Raises:
        ApiError: the client disconnected; the error is not sent.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(_CLIENT_CLOSED_REQUEST, "the client closed the connection")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def streamed(
    request: Request, lines: AsyncGenerator[bytes, None], media_type: str
) -> StreamingResponse:
    """Return a response whose status is determined once the first line is available.

    Args:
        request: a request whose body has been read.
        lines: lines to send; closed when the client disconnects.
        media_type: media type of the lines.

    Raises:
        ApiError: errors raised before the first line.
    """
    try:
        first = await unless_client_leaves(request, _next(lines))
    except BaseException:
        await lines.aclose()
        raise

    async def all_lines() -> AsyncGenerator[bytes, None]:
        async with aclosing(lines):
            yield first
            async for line in lines:
                yield line

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return _ClosedStream(lines, all_lines(), media_type=media_type, headers=headers)


class _ClosedStream(StreamingResponse):
    """A stream whose lines are always closed, read or not.

    If the client disconnects while a line is sent, or before the first one, Starlette leaves its
    iterator to the garbage collector, and the model would continue generating.
    """

    def __init__(self, lines: AsyncGenerator[bytes, None], *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines):
            await super().__call__(scope, receive, send)


async def _next(lines: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(lines)


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
