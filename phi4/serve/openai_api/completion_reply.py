"""The choices of `/v1/completions`."""

from collections.abc import Mapping, Sequence

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Request, Token
from phi4.serve.openai_api.completion_request import CompletionRequest
from phi4.serve.openai_api.logprobs import CompletionLogprobs, TokenNames, joined_logprobs
from phi4.serve.openai_api.reply import Part
from phi4.serve.pieces import ScoredPiece, TextPiece


class CompletionChoices:
    """Texts with lists of log-probs; see `Choices`.

    Args:
        body: the client's body.
        requests: the corresponding requests.
        tokenizer: tokenizer of the ids.
    """

    id_prefix = "cmpl"
    name = chunk_name = "text_completion"

    def __init__(
        self, body: CompletionRequest, requests: Sequence[Request], tokenizer: Tokenizer
    ) -> None:
        self.head: Mapping[str, object] = {}
        self._body, self._requests, self._tokenizer = body, requests, tokenizer
        self._names = TokenNames(tokenizer, body.return_tokens_as_token_ids)
        self._scores: dict[int, tuple[Token, ...]] = {}
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def take_scores(self, piece: ScoredPiece) -> None:
        """See `Choices.take_scores`."""
        self._scores[piece.prompt] = tuple(
            Token(one.id, one.log_prob, None, one.top) for one in piece.tokens
        )

    def part(self, piece: TextPiece, index: int, is_first: bool) -> Part | None:
        """See `Choices.part`."""
        shows_tokens = bool(piece.tokens) and (
            self._body.logprobs is not None or self._body.return_token_ids
        )
        if not (piece.text or piece.finish_reason or is_first or shows_tokens):
            return None
        prompt = self._requests[piece.prompt].prompt
        echo = self._tokenizer.decode(prompt) if is_first and self._body.echo else None
        scored = None if self._body.logprobs is None else self._scored(piece, index, echo)
        part: Part = {
            "index": index,
            "text": (echo or "") + piece.text,
            "logprobs": scored,
            "finish_reason": piece.finish_reason and piece.finish_reason.value,
        }
        if self._body.return_token_ids:
            part["token_ids"] = [token.id for token in piece.tokens]
            if is_first:
                part["prompt_token_ids"] = list(prompt)
        return part

    def joined(self, parts: Sequence[Part]) -> Part:
        """See `Choices.joined`."""
        whole = parts[0] | {
            "text": "".join(part["text"] for part in parts),
            "finish_reason": parts[-1]["finish_reason"],
        }
        if whole["logprobs"] is not None:
            whole["logprobs"] = joined_logprobs([part["logprobs"] for part in parts])
        if self._body.return_token_ids:
            whole["token_ids"] = [one for part in parts for one in part["token_ids"]]
        return whole

    def _scored(self, piece: TextPiece, index: int, echo: str | None) -> dict[str, list | None]:
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(
                self._names, self._tokenizer, self._body.logprobs or 0, self._body.sampled_logprobs
            )
        logprobs = self._logprobs[index]
        if echo is None:
            return logprobs.of(piece.tokens)
        before = logprobs.of_prompt(self._scores[piece.prompt], echo)
        return joined_logprobs([before, logprobs.of(piece.tokens)])
