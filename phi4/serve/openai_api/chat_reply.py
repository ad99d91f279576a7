"""The choices of `/v1/chat/completions`."""

from collections.abc import Mapping, Sequence

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Request
from phi4.serve.openai_api.chat_request import ChatRequest
from phi4.serve.openai_api.logprobs import TokenNames, chat_logprob
from phi4.serve.openai_api.reply import Part
from phi4.serve.pieces import ScoredPiece, TextPiece


class ChatChoices:
    """Turns of the assistant; see `Choices`.

    Args:
        body: the client's body.
        requests: the corresponding request.
        tokenizer: tokenizer of the ids.
    """

    id_prefix = "chatcmpl"
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, body: ChatRequest, requests: Sequence[Request], tokenizer: Tokenizer
    ) -> None:
        self._body = body
        self._names = TokenNames(tokenizer, body.return_tokens_as_token_ids)
        self.head: Mapping[str, object] = (
            {"prompt_token_ids": list(requests[0].prompt)} if body.return_token_ids else {}
        )

    def take_scores(self, piece: ScoredPiece) -> None:
        """See `Choices.take_scores`; chat requests have none."""

    def part(self, piece: TextPiece, index: int, is_first: bool) -> Part | None:
        """See `Choices.part`."""
        shows_tokens = bool(piece.tokens) and (self._body.logprobs or self._body.return_token_ids)
        if not (piece.text or piece.finish_reason or is_first or shows_tokens):
            return None
        delta = {"role": "assistant"} if is_first else {}
        if piece.text or is_first:
            delta["content"] = piece.text
        part: Part = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece) if self._body.logprobs else None,
            "finish_reason": piece.finish_reason and piece.finish_reason.value,
        }
        if self._body.return_token_ids:
            part["token_ids"] = [token.id for token in piece.tokens]
        return part

    def joined(self, parts: Sequence[Part]) -> Part:
        """See `Choices.joined`."""
        content = "".join(part["delta"].get("content", "") for part in parts)
        whole: Part = {
            "index": parts[0]["index"],
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": None,
            "finish_reason": parts[-1]["finish_reason"],
        }
        if self._body.logprobs:
            entries = [one for part in parts for one in part["logprobs"]["content"]]
            whole["logprobs"] = {"content": entries, "refusal": None}
        if self._body.return_token_ids:
            whole["token_ids"] = [one for part in parts for one in part["token_ids"]]
        return whole

    def _logprobs(self, piece: TextPiece) -> dict[str, list | None]:
        with_sampled = self._body.sampled_logprobs
        entries = [chat_logprob(token, self._names, with_sampled) for token in piece.tokens]
        return {"content": entries, "refusal": None}
