"""Replies of both completion APIs, complete or as server-sent events.

A complete reply is the sum of the parts of a stream, so that both are consistent.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from phi4.sampling.protocol import Request
from phi4.serve.api_errors import ApiError
from phi4.serve.pieces import Piece, ScoredPiece, TextPiece
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic

Part = dict[str, Any]
"""A choice of a stream's chunk, or of a complete reply."""

_DONE = b"data: [DONE]\n\n"


class Choices(Protocol):
    """How one of the APIs formats events of samples.

    Attributes:
        id_prefix: prefix of its replies' ids.
        name: `object` of its complete replies.
        chunk_name: `object` of its streams' chunks.
        head: further fields of a reply, or of the first chunk of a stream.
    """

    id_prefix: str
    name: str
    chunk_name: str
    head: Mapping[str, object]

    def take_scores(self, piece: ScoredPiece) -> None:
        """Store the log-probs of a prompt; called before the parts of its samples."""

    def part(self, piece: TextPiece, index: int, is_first: bool) -> Part | None:
        """Return a stream's part for a piece; None for nothing.

        Args:
            piece: event of a sample.
            index: index of its choice.
            is_first: whether it is the first of this choice.
        """

    def joined(self, parts: Sequence[Part]) -> Part:
        """Return a complete choice from all its parts."""


class Reply:
    """One answer.

    Args:
        choices: formatter of its choices.
        requests: requests for the model.
        model: the served model.
        traffic: the server's traffic.
    """

    def __init__(
        self, choices: Choices, requests: Sequence[Request], model: ServedModel, traffic: Traffic
    ) -> None:
        self._choices, self._requests, self._traffic = choices, requests, traffic
        self._num_new_tokens = 0
        self._head: Part = {
            "id": f"{choices.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }

    async def whole(self, asked: AsyncGenerator[Piece, None]) -> Part:
        """Return the reply once it is complete."""
        parts: dict[int, list[Part]] = {}
        async for part in self._parts(asked):
            parts.setdefault(part["index"], []).append(part)
        return {
            **self._head,
            "object": self._choices.name,
            **self._choices.head,
            "choices": [self._choices.joined(parts[index]) for index in sorted(parts)],
            "usage": self._usage(),
        }

    async def lines(
        self, asked: AsyncGenerator[Piece, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Yield the reply as server-sent events.

        Raises:
            ApiError: before the first event; later errors are sent as the last event.
        """
        has_begun = False
        try:
            async with aclosing(self._chunks(asked, include_usage)) as chunks:
                async for chunk in chunks:
                    has_begun = True
                    yield _event(chunk)
        except ApiError as error:
            if not has_begun:
                raise
            yield _event(error.openai_form())
            return
        yield _DONE

    async def _chunks(
        self, asked: AsyncGenerator[Piece, None], include_usage: bool
    ) -> AsyncGenerator[Part, None]:
        name, more = {"object": self._choices.chunk_name}, self._choices.head
        usage = {"usage": None} if include_usage else {}
        async with aclosing(self._parts(asked)) as parts:
            async for part in parts:
                yield {**self._head, **name, **more, "choices": [part], **usage}
                more = {}
        if include_usage:
            yield {**self._head, **name, "choices": [], "usage": self._usage()}

    async def _parts(self, asked: AsyncGenerator[Piece, None]) -> AsyncGenerator[Part, None]:
        begun: set[int] = set()
        async with aclosing(asked):
            async for piece in asked:
                # Other weights may be served once the request has ended.
                self._head.setdefault("system_fingerprint", self._traffic.weights)
                if isinstance(piece, ScoredPiece):
                    self._choices.take_scores(piece)
                    continue
                self._num_new_tokens += len(piece.tokens)
                index = piece.prompt * self._requests[piece.prompt].n + piece.sample
                part = self._choices.part(piece, index, index not in begun)
                begun.add(index)
                if part is not None:
                    yield part

    def _usage(self) -> dict[str, int]:
        num_prompt = sum(len(request.prompt) for request in self._requests)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_new_tokens,
            "total_tokens": num_prompt + self._num_new_tokens,
        }


def _event(content: Mapping[str, object]) -> bytes:
    """Encode in ASCII: some clients take a Unicode line separator for the end of an event."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
