"""Replies in Ollama's format, as lines or as one object."""

import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Request, Token
from phi4.serve.api_errors import ApiError
from phi4.serve.pieces import TextPiece, pieces
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic

Reply = dict[str, Any]
TextField = Callable[[str], Reply]
"""Field of a reply's text: `response`, or the content of `message`."""


@dataclass(frozen=True)
class ReplyForm:
    """Common fields of all replies to a request.

    Attributes:
        model: its name as the client wrote it.
        text_field: text field of the route.
    """

    model: str
    text_field: TextField

    def reply(self, text: str, **fields: Any) -> Reply:
        """Return a reply with some text; not the last one unless a field says so."""
        head = {"model": self.model, "created_at": rfc3339(time.time())}
        return {**head, **self.text_field(text), "done": False, **fields}

    def nothing_asked(self) -> Reply:
        """Return the answer to an empty prompt: the model is loaded."""
        return self.reply("", done=True, done_reason="load")


def as_response(text: str) -> Reply:
    """Return the text field of /api/generate."""
    return {"response": text}


def as_message(text: str) -> Reply:
    """Return the text field of /api/chat."""
    return {"message": {"role": "assistant", "content": text}}


async def replies(
    traffic: Traffic, model: ServedModel, request: Request, form: ReplyForm, begun_ns: int
) -> AsyncGenerator[Reply, None]:
    """Run a request; yield a reply per piece of text, then the last one with counts and times.

    Args:
        traffic: answers the request.
        model: the served model.
        request: request with one sample.
        form: form of the replies.
        begun_ns: time of arrival, by `time.perf_counter_ns`.

    Raises:
        ApiError: see `Traffic.ask`.
    """
    asked_ns, first_ns, num_tokens = time.perf_counter_ns(), None, 0
    unsent: list[Token] = []
    async with aclosing(pieces(traffic, model.tokenizer, [request])) as drawn:
        async for piece in drawn:
            # The prompt's log-probs are never requested.
            assert isinstance(piece, TextPiece)
            first_ns = first_ns or time.perf_counter_ns()
            num_tokens += len(piece.tokens)
            unsent += piece.tokens
            if piece.text:
                yield form.reply(piece.text, **_log_probs(unsent, request, model.tokenizer))
                unsent.clear()
            if piece.finish_reason is not None:
                end_ns = time.perf_counter_ns()
                yield form.reply(
                    "",
                    done=True,
                    done_reason=piece.finish_reason.value,
                    total_duration=end_ns - begun_ns,
                    load_duration=0,
                    prompt_eval_count=len(request.prompt),
                    prompt_eval_duration=first_ns - asked_ns,
                    eval_count=num_tokens,
                    eval_duration=end_ns - first_ns,
                    **_log_probs(unsent, request, model.tokenizer),
                )


async def whole(answer: AsyncGenerator[Reply, None], form: ReplyForm) -> Reply:
    """Join all replies: the last one, with the text and the log-probs of all."""
    texts: list[str] = []
    log_probs: list[Reply] = []
    last: Reply = {}
    async with aclosing(answer):
        async for last in answer:
            texts.append(last["message"]["content"] if "message" in last else last["response"])
            log_probs += last.get("logprobs", ())
    joined = {"logprobs": log_probs} if log_probs else {}
    return {**last, **form.text_field("".join(texts)), **joined}


async def lines(answer: AsyncGenerator[Reply, None]) -> AsyncGenerator[bytes, None]:
    """Yield replies as lines of JSON; an error after the first one is a line too.

    Raises:
        ApiError: errors before the first line, which determine the status.
    """
    has_begun = False
    async with aclosing(answer):
        try:
            async for reply in answer:
                yield _line(reply)
                has_begun = True
        except ApiError as error:
            if not has_begun:
                raise
            yield _line(error.ollama_form())


def rfc3339(unix_seconds: float) -> str:
    """Format a point in time, in UTC."""
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat().replace("+00:00", "Z")


def _line(reply: Reply) -> bytes:
    return json.dumps(reply, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _log_probs(tokens: Sequence[Token], request: Request, tokenizer: Tokenizer) -> Reply:
    """Return the log-probs field for tokens that have text, if requested."""
    if not request.log_probs:
        return {}
    scored = [
        {
            **_scored(token.id, token.log_prob, tokenizer),
            "top_logprobs": [_scored(one.id, one.log_prob, tokenizer) for one in token.top],
        }
        for token in tokens
        if token.id not in request.stop_ids
    ]
    return {"logprobs": scored} if scored else {}


def _scored(token_id: int, log_prob: float | None, tokenizer: Tokenizer) -> Reply:
    token = tokenizer.bytes_of(token_id)
    return {"token": token.decode(errors="replace"), "logprob": log_prob, "bytes": list(token)}
