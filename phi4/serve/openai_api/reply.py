"""Answers of both completion APIs, whole or as server-sent events.

The decision: a whole answer is the sum of the parts that a stream sends, so both say the same.
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
"""A choice of a stream's chunk, or of a whole answer."""

_DONE = b"data: [DONE]\n\n"


class Choices(Protocol):
    """How one of the APIs writes what happens to the samples.

    Attributes:
        id_prefix: of its answers' ids.
        name: of its whole answers, in `object`.
        chunk_name: of the chunks of its streams.
        head: further fields of an answer, or of the first chunk of a stream.
    """

    id_prefix: str
    name: str
    chunk_name: str
    head: Mapping[str, object]

    def take_scores(self, piece: ScoredPiece) -> None:
        """Note the log-probs of a prompt; before the parts of its samples."""

    def part(self, piece: TextPiece, index: int, is_first: bool) -> Part | None:
        """What a stream says of a piece; None for nothing.

        Args:
            piece: what happened to a sample.
            index: of its choice.
            is_first: whether it is the first of this choice.
        """

    def joined(self, parts: Sequence[Part]) -> Part:
        """A whole choice, of all its parts."""


class Reply:
    """One answer.

    Args:
        choices: how its choices are written.
        requests: what the model is asked.
        model: that is served.
        traffic: of it.
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
        """The answer once it is complete."""
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
        """The answer as server-sent events.

        Raises:
            ApiError: before the first event; afterwards it is an event, and the last one.
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
    """In ASCII: some clients take a Unicode line separator for the end of an event."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
