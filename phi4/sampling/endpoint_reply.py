"""Parse an endpoint's replies into events; a server that ignores a field raises an error."""

import math
from collections.abc import Mapping, Sequence

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.endpoint import PromptForm
from phi4.sampling.event_stream import EventStreamError
from phi4.sampling.protocol import (
    Alternative,
    Completion,
    Event,
    FinishReason,
    PromptToken,
    Request,
    ScoredPrompt,
    Token,
)
from phi4.sampling.samples import OpenSample

_ID_PREFIX = "token_id:"
_NO_PROBABILITY = -9999.0
"""JSON value for the logarithm of 0, by OpenAI's convention."""


class ReplyReader:
    """Parses the reply to one request, chunk by chunk.

    Args:
        request_id: request id of its events.
        request: the request.
        form: form of the answer.
        tokenizer: tokenizer of the ids.
    """

    def __init__(
        self, request_id: int, request: Request, form: PromptForm, tokenizer: Tokenizer
    ) -> None:
        self._request_id, self._request = request_id, request
        self._form, self._tokenizer = form, tokenizer
        self._samples = [
            OpenSample(request_id, index, request, tokenizer) for index in range(request.n)
        ]
        self._without_prompt = set(range(request.n)) if request.prompt_log_probs else set[int]()
        self._is_scored = False

    @property
    def has_ended(self) -> bool:
        """Return whether all samples have ended."""
        return all(sample.has_ended for sample in self._samples)

    def forced(self) -> list[Event]:
        """Return the forced tokens, if they are part of the sent prompt."""
        if self._form is PromptForm.PHI4:
            return []
        return [
            event
            for sample in self._samples
            for token_id in self._request.forced
            for event in sample.add(Token(token_id))
        ]

    def cancelled(self) -> list[Completion]:
        """Return the completions of the samples that have not ended."""
        left = [sample for sample in self._samples if not sample.has_ended]
        return [sample.end(FinishReason.CANCELLED) for sample in left]

    def read(self, chunk: Mapping) -> list[Event]:
        """Parse a chunk into events; anything after a sample's end is ignored.

        Raises:
            EventStreamError: the server failed, or does not support the request.
        """
        if "error" in chunk:
            raise EventStreamError(f"failed during the answer: {chunk['error']}")
        happened: list[Event] = []
        for choice in chunk.get("choices") or ():
            happened += self._read(choice, self._samples[choice["index"]])
        return happened

    def _read(self, choice: dict, sample: OpenSample) -> list[Event]:
        happened: list[Event] = []
        if sample.has_ended:
            return happened
        if sample.index in self._without_prompt:
            self._without_prompt.discard(sample.index)
            happened += self._scored_prompt(choice)
        for token in self._tokens(choice):
            happened += sample.add(token)
            self._check_first(sample)
            if sample.has_ended:
                return happened
        reason = choice.get("finish_reason")
        if reason is not None:
            happened.append(sample.end(FinishReason(reason)))
        return happened

    def _scored_prompt(self, choice: dict) -> list[Event]:
        """Remove the prompt from the log-probs of a sample's first piece; report the first one."""
        lists, length = choice["logprobs"], len(self._request.prompt)
        echoed = {name: (values or ())[:length] for name, values in lists.items()}
        expected = [f"{_ID_PREFIX}{token_id}" for token_id in self._request.prompt]
        if echoed["tokens"] != expected:
            raise EventStreamError("does not score the prompt (echo); set form to ids")
        choice["logprobs"] = {name: values and values[length:] for name, values in lists.items()}
        if self._is_scored:
            return []
        self._is_scored = True
        tops = echoed["top_logprobs"] or [{}] * length
        tokens = zip(self._request.prompt, echoed["token_logprobs"], tops, strict=True)
        scored = (PromptToken(i, _log_prob(value), self._top(top)) for i, value, top in tokens)
        return [ScoredPrompt(self._request_id, tuple(scored))]

    def _tokens(self, choice: dict) -> list[Token]:
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if not self._form.is_in_ids:
            return list(map(Token, self._tokenizer.encode(text)))
        ids = choice.get("token_ids")
        if ids is None and text:
            raise EventStreamError(
                "sends no token ids, because it lacks return_token_ids; set form to text or chat"
            )
        vocab_size = self._tokenizer.vocab_size
        foreign = [i for i in ids or () if not 0 <= i < vocab_size]
        if foreign:
            raise EventStreamError(f"sent token id {foreign[0]}, which the tokenizer does not have")
        if not ids or not self._request.log_probs:
            return list(map(Token, ids or ()))
        return self._scored(ids, choice["logprobs"])

    def _scored(self, ids: Sequence[int], lists: dict) -> list[Token]:
        raw = lists["token_logprobs"]
        tops = lists["top_logprobs"] if self._request.num_top_log_probs else [{}] * len(ids)
        if self._form is PromptForm.IDS:
            # No requested field makes the two differ.
            values = zip(ids, raw, raw, tops, strict=True)
            return [Token(i, value, same, self._top(top)) for i, value, same, top in values]
        if "sampled_logprobs" not in lists:
            raise EventStreamError("sends no sampled_logprobs; set form to ids")
        values = zip(ids, raw, lists["sampled_logprobs"], tops, strict=True)
        return [
            Token(i, _log_prob(value), _log_prob(sampled), self._top(top))
            for i, value, sampled, top in values
        ]

    def _top(self, top: Mapping[str, float] | None) -> tuple[Alternative, ...]:
        """Return the likeliest tokens; servers add the sampled token if it is not among them."""
        top = top or {}
        if not all(name.startswith(_ID_PREFIX) for name in top):
            raise EventStreamError(
                "reports tokens as text, because it lacks return_tokens_as_token_ids"
            )
        found = [
            Alternative(int(name.removeprefix(_ID_PREFIX)), value)
            for name, value in top.items()
            if self._form is PromptForm.IDS or value > _NO_PROBABILITY
        ]
        found.sort(key=lambda one: (-one.log_prob, one.id))
        return tuple(found[: self._request.num_top_log_probs])

    def _check_first(self, sample: OpenSample) -> None:
        """Check the first token: a server that ignores our fields would answer another request
        unnoticed."""
        if self._form is not PromptForm.PHI4:
            return
        forced = self._request.forced[: len(sample.ids)]
        if tuple(sample.ids[: len(forced)]) != forced:
            raise EventStreamError("ignores first_token_forced; set form to ids")
        if sample.ids[0] in self._request.forbidden_first:
            raise EventStreamError("ignores first_tokens_forbidden; set form to ids")


def _log_prob(value: float | None) -> float | None:
    if value is None:
        return None
    return -math.inf if value <= _NO_PROBABILITY else value
