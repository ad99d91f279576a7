"""A sample that grows: the one place that decides when it has ended."""

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Completion, Event, FinishReason, NewToken, Request, Token
from phi4.sampling.text import StopStrings


class OpenSample:
    """One of a request's samples, fed token by token by a sampler.

    Attributes:
        request: what was asked.
        index: of the sample, below the request's n.
        ids: new tokens so far.
        has_ended: whether its completion was made.
    """

    def __init__(self, request_id: int, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.index = index
        self.ids: list[int] = []
        self.has_ended = False
        self._request_id = request_id
        self._tokenizer = tokenizer
        self._tokens: list[Token] = []
        self._stops = StopStrings(request.stop_strings)

    def add(self, token: Token) -> list[Event]:
        """What one more token makes happen: it is drawn, and it may be the last one."""
        self.ids.append(token.id)
        self._tokens.append(token)
        happened: list[Event] = [NewToken(self._request_id, self.index, token)]
        matched = self._matched(token.id)
        if matched is not None:
            happened.append(self.end(FinishReason.STOP, matched))
        elif len(self.ids) == self.request.max_tokens:
            happened.append(self.end(FinishReason.LENGTH))
        return happened

    def end(self, reason: FinishReason, matched: int | bytes | None = None) -> Completion:
        """Its completion, with the tokens so far."""
        self.has_ended = True
        return Completion(self._request_id, self.index, tuple(self._tokens), reason, matched)

    def _matched(self, token_id: int) -> int | bytes | None:
        if token_id in self.request.stop_ids:
            return token_id
        if self.request.stop_strings:
            self._stops.feed(self._tokenizer.bytes_of(token_id))
        return self._stops.matched
