"""Log-probs in OpenAI's two formats: lists in completions, objects in chat.

They are the raw model's regardless of the temperature; `sampled_log_prob` of a token is in the
distribution that it was sampled from.
"""

import codecs
from collections.abc import Sequence

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Alternative, Token

VERY_UNLIKELY = -9999.0
"""OpenAI's value for a probability of 0, because JSON has no infinity."""


class TokenNames:
    """Tokens as texts.

    Args:
        tokenizer: tokenizer of the ids.
        as_ids: write `token_id:ID` (vLLM's `return_tokens_as_token_ids`).
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids
        self._special_ids = frozenset(tokenizer.special_tokens.values())

    def in_completion(self, token_id: int) -> str:
        """Return its text, or `bytes:` and its bytes if it is only a part of a character."""
        return self._name(token_id, "bytes:")

    def in_chat(self, token_id: int) -> str:
        """Return its text, and its bytes if it is only a part of a character."""
        return self._name(token_id, "")

    def bytes_of(self, token_id: int) -> list[int] | None:
        """Return its bytes; a special token has none."""
        if token_id in self._special_ids:
            return None
        return list(self._tokenizer.bytes_of(token_id))

    def _name(self, token_id: int, prefix: str) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self._tokenizer.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{value:02x}" for value in data)


class CompletionLogprobs:
    """The `logprobs` of one choice of a completion, piece by piece.

    Args:
        names: converts tokens to text.
        tokenizer: tokenizer of the ids.
        num_top: number of likeliest tokens at each position.
        with_sampled: whether `sampled_logprobs` is requested.
    """

    def __init__(
        self, names: TokenNames, tokenizer: Tokenizer, num_top: int, with_sampled: bool
    ) -> None:
        self._names, self._tokenizer = names, tokenizer
        self._num_top, self._with_sampled = num_top, with_sampled
        self._begin_part()

    def of_prompt(self, tokens: Sequence[Token], text: str) -> dict[str, list | None]:
        """Return those of an echoed prompt; new tokens follow its text."""
        found = self.of(tokens)
        self._begin_part(len(text))
        return found

    def of(self, tokens: Sequence[Token]) -> dict[str, list | None]:
        """Return those of some more tokens."""
        found: dict[str, list | None] = {
            "tokens": [self._names.in_completion(token.id) for token in tokens],
            "token_logprobs": [_finite(token.log_prob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._num_top else None,
            "text_offset": [self._offset(token.id) for token in tokens],
        }
        if self._with_sampled:
            found["sampled_logprobs"] = [_finite(token.sampled_log_prob) for token in tokens]
        return found

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """Return the likeliest tokens, and this one; a text that two share belongs to the
        likelier."""
        if token.log_prob is None:
            return None
        named: dict[str, float | None] = {}
        likeliest: tuple[Alternative | Token, ...] = (*token.top, token)
        for one in likeliest:
            named.setdefault(self._names.in_completion(one.id), _finite(one.log_prob))
        return named

    def _offset(self, token_id: int) -> int:
        """Return the number of complete characters before a token."""
        offset = self._num_characters
        data = self._tokenizer.bytes_of(token_id)
        self._num_characters += len(self._decoder.decode(data))
        return offset

    def _begin_part(self, num_characters: int = 0) -> None:
        self._num_characters = num_characters
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")


def joined_logprobs(parts: Sequence[dict[str, list | None]]) -> dict[str, list | None]:
    """Concatenate the lists of all pieces of a completion."""
    return {
        name: None if first is None else [one for part in parts for one in part[name] or ()]
        for name, first in parts[0].items()
    }


def chat_logprob(token: Token, names: TokenNames, with_sampled: bool) -> dict[str, object]:
    """Return a token's entry in a chat completion's `logprobs.content`."""
    top = [_chat_entry(one.id, one.log_prob, names) for one in token.top]
    entry = _chat_entry(token.id, token.log_prob, names) | {"top_logprobs": top}
    return entry | ({"sampled_logprob": _finite(token.sampled_log_prob)} if with_sampled else {})


def _chat_entry(token_id: int, log_prob: float | None, names: TokenNames) -> dict[str, object]:
    name = names.in_chat(token_id)
    return {"token": name, "logprob": _finite(log_prob), "bytes": names.bytes_of(token_id)}


def _finite(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, VERY_UNLIKELY)
