"""A sampler over a script: known probabilities, no model, no engine.

A script is a next-token distribution, even if it is a table of answers. Every field of a request
thus has the same meaning as for a model, log-probs are known exactly, and code tested with this
sampler also runs on an engine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError, SamplerError
from phi4.sampling.checks import check_request
from phi4.sampling.distribution import draw, sampled_log_probs
from phi4.sampling.protocol import (
    Alternative,
    Event,
    FinishReason,
    ModelLimits,
    PromptToken,
    Request,
    ScoredPrompt,
    Token,
)
from phi4.sampling.samples import OpenSample

Script = Callable[[tuple[int, ...]], Mapping[int, float]]
"""Maps the ids so far, prompt and answer, to the probabilities of the next one; ids with 0 may be
missing."""

Answers = Mapping[tuple[int, ...], float]
"""Answers in ids, each with its probability."""


class AnswerTable:
    """A script with complete answers to some prompts, each followed by an end token."""

    def __init__(self, answers: Mapping[tuple[int, ...], Answers], end_id: int) -> None:
        """Set the answers to every prompt.

        Raises:
            ConfigError: a prompt begins with another one, so that its continuation would be
                ambiguous.
        """
        ordered = sorted(answers)
        # All entries that begin with a prompt follow it in this order.
        for one, other in pairwise(ordered):
            if other[: len(one)] == one:
                raise ConfigError(
                    f"prompt {other} of the table begins with prompt {one}; remove one"
                )
        self._end_id = end_id
        self._answers = answers

    def __call__(self, ids: tuple[int, ...]) -> Mapping[int, float]:
        """Return the probabilities of the next token; empty if no answer matches."""
        prompt = next((p for p in self._answers if ids[: len(p)] == p), None)
        if prompt is None:
            return {}
        said = ids[len(prompt) :]
        weights: dict[int, float] = {}
        for answer, weight in self._answers[prompt].items():
            whole = (*answer, self._end_id)
            if whole[: len(said)] == said and len(said) < len(whole):
                weights[whole[len(said)]] = weights.get(whole[len(said)], 0.0) + weight
        total = math.fsum(weights.values())
        return {token_id: weight / total for token_id, weight in weights.items() if weight > 0}


class ScriptedSampler:
    """A `Sampler` over a script; each step samples a token for every sample.

    Args:
        script: a custom function, or an `AnswerTable`.
        tokenizer: tokenizer of the ids.
        max_sequence_tokens: as in `ModelLimits`.
    """

    def __init__(
        self, script: Script, tokenizer: Tokenizer, max_sequence_tokens: int | None = None
    ) -> None:
        self.limits = ModelLimits(tokenizer.vocab_size, max_sequence_tokens)
        self._script = script
        self._tokenizer = tokenizer
        self._num_requests = 0
        self._unscored: dict[int, Request] = {}
        self._open: dict[int, list[OpenSample]] = {}
        self._happened: list[Event] = []

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`."""
        check_request(request, self.limits)
        request_id = self._num_requests
        self._num_requests += 1
        if request.prompt_log_probs:
            self._unscored[request_id] = request
        self._open[request_id] = [
            OpenSample(request_id, index, request, self._tokenizer) for index in range(request.n)
        ]
        return request_id

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`."""
        for request_id, samples in list(self._open.items()):
            try:
                self._happened += self._advance(request_id, samples)
            except SamplerError:
                del self._open[request_id]
                raise
            self._open[request_id] = [sample for sample in samples if not sample.has_ended]
            if not self._open[request_id]:
                del self._open[request_id]
        happened, self._happened = self._happened, []
        return happened

    def cancel(self, request_id: int) -> None:
        """See `Sampler.cancel`."""
        self._unscored.pop(request_id, None)
        for sample in self._open.pop(request_id, ()):
            self._happened.append(sample.end(FinishReason.CANCELLED))

    def close(self) -> None:
        """See `Sampler.close`."""
        self._unscored.clear()
        self._open.clear()
        self._happened.clear()

    def _advance(self, request_id: int, samples: Sequence[OpenSample]) -> list[Event]:
        happened: list[Event] = []
        request = self._unscored.pop(request_id, None)
        if request is not None:
            happened.append(ScoredPrompt(request_id, self._score(request_id, request)))
        for sample in samples:
            if sample.request.max_tokens == 0:
                happened.append(sample.end(FinishReason.LENGTH))
            else:
                happened += sample.add(self._next_token(request_id, sample))
        return happened

    def _next_token(self, request_id: int, sample: OpenSample) -> Token:
        request, position = sample.request, len(sample.ids)
        ids = (*request.prompt, *sample.ids)
        raw = self._log_probs(request_id, ids)
        left = sampled_log_probs(raw, request, position == 0)
        if position < len(request.forced):
            token_id = request.forced[position]
        elif left:
            token_id = draw(left, request.seed, sample.index, len(ids))
        else:
            raise SamplerError("the script only has forbidden first tokens", request_id)
        if not request.log_probs:
            return Token(token_id)
        return Token(
            token_id,
            raw.get(token_id, -math.inf),
            left.get(token_id, -math.inf),
            _likeliest(raw, request.num_top_log_probs),
        )

    def _score(self, request_id: int, request: Request) -> tuple[PromptToken, ...]:
        scored = [PromptToken(request.prompt[0], None)]
        for length, token_id in enumerate(request.prompt[1:], start=1):
            raw = self._log_probs(request_id, request.prompt[:length])
            top = _likeliest(raw, request.num_top_log_probs)
            scored.append(PromptToken(token_id, raw.get(token_id, -math.inf), top))
        return tuple(scored)

    def _log_probs(self, request_id: int, ids: tuple[int, ...]) -> dict[int, float]:
        """Return the script's log-probs, validated.

        Raises:
            SamplerError: it is empty, or not a distribution over the vocabulary.
        """
        said = self._script(ids)
        if not said:
            raise SamplerError(f"the script has no entry for {_shown(ids)}", request_id)
        total = math.fsum(said.values())
        if min(said.values()) < 0 or not abs(total - 1) < 1e-9:
            raise SamplerError(
                f"the script's probabilities after {_shown(ids)} add up to {total}, not 1, or one "
                "is negative",
                request_id,
            )
        if not 0 <= min(said) <= max(said) < self.limits.vocab_size:
            raise SamplerError(
                f"the script has token ids {min(said)} to {max(said)} after {_shown(ids)}, but the "
                f"tokenizer has 0 to {self.limits.vocab_size - 1}",
                request_id,
            )
        return {token_id: math.log(p) for token_id, p in said.items() if p > 0}


def _likeliest(log_probs: Mapping[int, float], num: int) -> tuple[Alternative, ...]:
    ordered = sorted(log_probs, key=lambda token_id: (-log_probs[token_id], token_id))
    return tuple(Alternative(token_id, log_probs[token_id]) for token_id in ordered[:num])


def _shown(ids: tuple[int, ...]) -> str:
    return f"ids {list(ids)}" if len(ids) <= 8 else f"{len(ids)} ids that end in {list(ids[-8:])}"
