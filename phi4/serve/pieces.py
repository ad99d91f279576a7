"""Pieces of text with their tokens, from which every API builds its replies."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import (
    Completion,
    FinishReason,
    NewToken,
    PromptToken,
    Request,
    ScoredPrompt,
    Token,
)
from phi4.sampling.text import TextStream
from phi4.serve.traffic import Traffic


@dataclass(frozen=True)
class ScoredPiece:
    """The log-probs of a prompt; sent before the pieces of its samples."""

    prompt: int
    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True)
class TextPiece:
    """A sample grew, or ended.

    Attributes:
        prompt: index of the request.
        sample: index, below the request's n.
        text: text that can be shown now; empty while a character or a stop string is incomplete.
            Excludes the stop that ended the sample.
        tokens: sampled tokens.
        finish_reason: None while it continues.
        matched: the stop that ended it; see `Completion`.
    """

    prompt: int
    sample: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    matched: int | bytes | None = None


Piece = ScoredPiece | TextPiece


async def pieces(
    traffic: Traffic, tokenizer: Tokenizer, requests: Sequence[Request]
) -> AsyncGenerator[Piece, None]:
    """Submit requests; yield a piece per sample and step until all samples have ended.

    Raises:
        ApiError: see `Traffic.ask`.
    """
    streams = {
        (prompt, sample): TextStream(tokenizer, request.stop_ids, request.stop_strings)
        for prompt, request in enumerate(requests)
        for sample in range(request.n)
    }
    async with aclosing(traffic.ask(requests)) as asked:
        async for prompt, happened in asked:
            grown: dict[int, list[Token]] = {}
            ended: dict[int, Completion] = {}
            for event in happened:
                match event:
                    case ScoredPrompt(tokens=scored):
                        yield ScoredPiece(prompt, scored)
                    case NewToken(sample=sample, token=token):
                        grown.setdefault(sample, []).append(token)
                    case Completion(sample=sample):
                        grown.setdefault(sample, [])
                        ended[sample] = event
            for sample, tokens in grown.items():
                stream = streams[prompt, sample]
                text = "".join(stream.feed(token.id) for token in tokens)
                end = ended.get(sample)
                if end is not None:
                    text += stream.finish()
                yield TextPiece(
                    prompt,
                    sample,
                    text,
                    tuple(tokens),
                    None if end is None else end.finish_reason,
                    None if end is None else end.matched,
                )
