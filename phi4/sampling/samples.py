"""A growing sample, and the decision when it has ended."""

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Completion, Event, FinishReason, NewToken, Request, Token
from phi4.sampling.text import StopStrings


class OpenSample:
    """One of a request's samples, to which a sampler adds tokens.

    Attributes:
        request: the request.
        index: index of the sample, below the request's n.
        ids: new tokens so far.
        has_ended: whether its completion was returned.
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
        """Return the events of one more token: the new token, and the completion if it is the last
        one."""
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
        """Return its completion, with the tokens so far."""
        self.has_ended = True
        return Completion(self._request_id, self.index, tuple(self._tokens), reason, matched)

    def _matched(self, token_id: int) -> int | bytes | None:
        if token_id in self.request.stop_ids:
            return token_id
        if self.request.stop_strings:
            self._stops.feed(self._tokenizer.bytes_of(token_id))
        return self._stops.matched
