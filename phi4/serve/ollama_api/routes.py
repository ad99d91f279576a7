"""The routes below /api."""

import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from phi4 import __version__
from phi4.serve.ollama_api.bodies import (
    AskedFields,
    GenerateBody,
    OllamaChatBody,
    ShowBody,
    read_body,
    request_of,
)
from phi4.serve.ollama_api.cards import check_name, running_card, show_card, tags_card
from phi4.serve.ollama_api.replies import (
    ReplyForm,
    TextField,
    as_message,
    as_response,
    lines,
    replies,
    whole,
)
from phi4.serve.responses import streamed, unless_client_leaves
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic

NDJSON = "application/x-ndjson"
_READ = ["GET", "HEAD"]


def ollama_router(traffic: Traffic, model: ServedModel) -> APIRouter:
    """Make the router of `/api/generate`, `/api/chat`, `/api/tags`, `/api/ps`, `/api/version` and
    `/api/show`."""
    router = APIRouter(prefix="/api")

    @router.post("/generate")
    async def generate(http: HttpRequest) -> Response:
        begun_ns = time.perf_counter_ns()
        body = await read_body(http, GenerateBody)
        return await _answer(http, traffic, model, body, as_response, begun_ns)

    @router.post("/chat")
    async def chat(http: HttpRequest) -> Response:
        begun_ns = time.perf_counter_ns()
        body = await read_body(http, OllamaChatBody)
        return await _answer(http, traffic, model, body, as_message, begun_ns)

    @router.api_route("/tags", methods=_READ)
    async def tags() -> dict[str, Any]:
        return {"models": [tags_card(model, traffic.weights)]}

    @router.get("/ps")
    async def running() -> dict[str, Any]:
        return {"models": [running_card(model, traffic.weights)]}

    @router.post("/show")
    async def show(http: HttpRequest) -> dict[str, Any]:
        body = await read_body(http, ShowBody)
        check_name(body.model or body.name, model)
        return show_card(model)

    @router.api_route("/version", methods=_READ)
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return router


async def _answer(
    http: HttpRequest,
    traffic: Traffic,
    model: ServedModel,
    body: AskedFields,
    text_field: TextField,
    begun_ns: int,
) -> Response:
    """Answer a body, as a stream or in one reply.

    Raises:
        ApiError: it is rejected, or fails before its first text.
    """
    check_name(body.model, model)
    form = ReplyForm(body.model, text_field)
    if body.is_empty:
        return JSONResponse(form.nothing_asked())
    answer = replies(traffic, model, request_of(body, model), form, begun_ns)
    if body.stream:
        return await streamed(http, lines(answer), NDJSON)
    return JSONResponse(await unless_client_leaves(http, whole(answer, form)))
