"""The routes below /v1."""

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from phi4.sampling.endpoint_card import OWNER
from phi4.sampling.protocol import Request
from phi4.serve.api_errors import ApiError
from phi4.serve.openai_api.chat_reply import ChatChoices
from phi4.serve.openai_api.chat_request import ChatRequest
from phi4.serve.openai_api.completion_reply import CompletionChoices
from phi4.serve.openai_api.completion_request import CompletionRequest
from phi4.serve.openai_api.reply import Choices, Reply
from phi4.serve.openai_api.request_fields import SamplingFields
from phi4.serve.pieces import pieces
from phi4.serve.responses import streamed, unless_client_leaves
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic

_EVENT_STREAM = "text/event-stream"


def openai_router(traffic: Traffic, model: ServedModel) -> APIRouter:
    """Make the router of `/v1/models`, `/v1/completions` and `/v1/chat/completions`."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [_card(traffic, model)]}

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, object]:
        _check_name(name, model)
        return _card(traffic, model)

    @router.post("/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        _check_name(body.model, model)
        # In a thread: encoding a long text takes time.
        requests = await asyncio.to_thread(body.requests, model)
        choices = CompletionChoices(body, requests, model.tokenizer)
        return await answer(http, body, choices, requests)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        _check_name(body.model, model)
        requests = await asyncio.to_thread(body.requests, model)
        choices = ChatChoices(body, requests, model.tokenizer)
        return await answer(http, body, choices, requests)

    async def answer(
        http: HttpRequest, body: SamplingFields, choices: Choices, requests: Sequence[Request]
    ) -> Response:
        reply = Reply(choices, requests, model, traffic)
        asked = pieces(traffic, model.tokenizer, requests)
        if body.stream:
            return await streamed(http, reply.lines(asked, body.include_usage), _EVENT_STREAM)
        return JSONResponse(await unless_client_leaves(http, reply.whole(asked)))

    return router


def _check_name(name: str, model: ServedModel) -> None:
    """Raise an error for a model that is not served.

    Raises:
        ApiError: 404.
    """
    if name != model.name:
        raise ApiError(
            404,
            f"The model `{name}` does not exist; this server has `{model.name}`",
            param="model",
            code="model_not_found",
        )


def _card(traffic: Traffic, model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix,
        "owned_by": OWNER,
        "root": traffic.weights,
        "max_model_len": model.limits.max_sequence_tokens,
        "tokenizer": model.tokenizer.fingerprint,
    }
