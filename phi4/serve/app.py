"""The server's application: routes, authorisation, and the format of every error."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from phi4.serve.api_errors import ApiError, ErrorType, bad_request
from phi4.serve.metrics import registry_of
from phi4.serve.ollama_api.routes import ollama_router
from phi4.serve.openai_api.routes import openai_router
from phi4.serve.page import page_router
from phi4.serve.responses import error_response
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic
from phi4.serve.web_pages import LOOPBACK_HOSTS, OwnPagesOnly

MAX_BODY_BYTES = 4 << 20
"""Twenty times the longest prompt of phi-4 as a list of ids."""

_KEYED = ("/v1/", "/api/", "/metrics")

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


def make_app(
    traffic: Traffic,
    model: ServedModel,
    api_key: str | None = None,
    hosts: frozenset[str] | None = LOOPBACK_HOSTS,
) -> FastAPI:
    """Make the application.

    Args:
        traffic: answers the requests.
        model: the served model.
        api_key: bearer token required of clients; None requires none.
        hosts: host names accepted in requests, as `web_pages.hosts_of` returns them.
    """
    app = FastAPI(title="phi4 serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_BodyLimit)
    app.add_middleware(_ApiKey, api_key=api_key)
    app.add_middleware(OwnPagesOnly, hosts=hosts)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "shutting down" if traffic.is_draining else "ok"
        body = {"status": status, "model": model.name, "weights": traffic.weights}
        return JSONResponse(body, 503 if traffic.is_draining else 200)

    registry = registry_of(traffic)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(page_router())
    app.include_router(openai_router(traffic, model))
    app.include_router(ollama_router(traffic, model))
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.url.path, error)


async def _invalid(request: Request, error: Exception) -> Response:
    """Describe the first error of a body, with its field."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"] if part != "body")
    if fault["type"] == "json_invalid":
        said = bad_request(f"the body is not JSON: {fault['ctx']['error']}")
    else:
        got = "" if fault["type"] == "missing" else f", got {str(fault['input'])[:100]!r}"
        said = bad_request(f"{field or 'the body'}: {fault['msg']}{got}", param=field or None)
    return error_response(request.url.path, said)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"{path} does not exist",
        405: f"{path} does not support {request.method}",
    }.get(error.status_code, str(error.detail))
    return error_response(path, ApiError(error.status_code, message))


async def _unexpected(request: Request, error: Exception) -> Response:
    said = ApiError(500, f"the server failed: {type(error).__name__}", kind=ErrorType.SERVER)
    return error_response(request.url.path, said)


class _BodyLimit:
    """Rejects bodies beyond the limit, also those without a declared length."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        num_bytes = 0

        async def counted() -> _Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise _too_long()
            return message

        if said.isdigit() and int(said) > MAX_BODY_BYTES:
            await error_response(scope["path"], _too_long())(scope, receive, send)
            return
        await self._app(scope, counted, send)


def _too_long() -> ApiError:
    return ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes; send less")


class _ApiKey:
    """Rejects requests without the key, if there is one; the page and /health need none."""

    def __init__(self, app: Callable[..., Awaitable[None]], api_key: str | None) -> None:
        self._app, self._expected = app, api_key and f"Bearer {api_key}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "http" and self._expected and scope["path"].startswith(_KEYED):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, self._expected):
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    kind=ErrorType.AUTHENTICATION,
                    code="invalid_api_key",
                )
                await error_response(scope["path"], error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
