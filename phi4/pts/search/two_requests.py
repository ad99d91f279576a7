"""Emulate a forbidden first token with two requests: first tokens, then their continuations.

An endpoint can only ban a token at every position, so the first request samples one token of each
sample under the ban. If the sampler truncates its distribution (top-p), a ban would admit tokens
that it never samples; the first request then samples without a ban, and forbidden tokens are
resampled. The second request continues from each different token. The search sees a single request.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from phi4.errors import ConfigError, SamplerError
from phi4.sampling.protocol import (
    Completion,
    Event,
    FinishReason,
    ModelLimits,
    NewToken,
    Request,
    Sampler,
    ScoredPrompt,
)

_DRAWS_PER_SAMPLE = 6
"""Number of first tokens sampled without a ban per required one."""

_MAX_ROUNDS = 100


@dataclass
class _OpenRequest:
    """A request, and the requests that it was split into.

    Attributes:
        request: the original request.
        is_split: whether it is split in two parts.
        parts: open requests of the inner sampler, each with its samples; None for first tokens.
        first: first token of each sample, once sampled.
        drawn: completions of the open request for first tokens.
        num_rounds: requests for first tokens so far.
        num_left: samples without a completion.
        is_cancelled: whether nothing more is requested.
    """

    request: Request
    is_split: bool
    parts: dict[int, Sequence[int] | None] = field(default_factory=dict)
    first: list[Completion] = field(default_factory=list)
    drawn: list[Completion] = field(default_factory=list)
    num_rounds: int = 0
    num_left: int = 0
    is_cancelled: bool = False


class TwoRequestSampler:
    """A `Sampler` with exact `forbidden_first` over an inner sampler.

    Args:
        sampler: the inner sampler; this one closes it.
        redraws: sample first tokens without a ban, and resample the forbidden ones.
    """

    def __init__(self, sampler: Sampler, redraws: bool = False) -> None:
        self._sampler = sampler
        self._redraws = redraws
        self._num_requests = 0
        self._open: dict[int, _OpenRequest] = {}
        self._owners: dict[int, int] = {}
        self._happened: list[Event] = []
        self._failed: list[SamplerError] = []

    @property
    def limits(self) -> ModelLimits:
        """See `Sampler.limits`."""
        return self._sampler.limits

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`.

        Raises:
            ConfigError: also for stop strings together with a forbidden first token.
        """
        is_split = bool(request.forbidden_first) and not request.forced
        is_split = is_split and (self._redraws or request.max_tokens > 1)
        if is_split and request.stop_strings:
            raise ConfigError(
                "a request cannot forbid the first token and stop at a string, which may begin "
                "with it; remove stop_strings"
            )
        one = _OpenRequest(request, is_split, num_left=request.n)
        request_id = self._num_requests
        if is_split:
            self._ask_first(one, request_id)
        else:
            self._ask(one, request_id, request, range(request.n))
        self._num_requests += 1
        self._open[request_id] = one
        return request_id

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`."""
        try:
            events = self._sampler.step()
        except SamplerError as error:
            events = ()
            self._fail(error)
        for event in events:
            # A failed request is gone; later events of its parts are dropped.
            if event.request_id in self._owners:
                try:
                    self._take(event, self._owners[event.request_id])
                except SamplerError as error:
                    self._fail(error)
        if self._failed:
            raise self._failed.pop(0)
        happened, self._happened = self._happened, []
        return happened

    def cancel(self, request_id: int) -> None:
        """See `Sampler.cancel`."""
        if request_id in self._open:
            self._open[request_id].is_cancelled = True
            for part in self._open[request_id].parts:
                self._sampler.cancel(part)

    def close(self) -> None:
        """See `Sampler.close`."""
        self._open.clear()
        self._owners.clear()
        self._sampler.close()

    def _take(self, event: Event, request_id: int) -> None:
        one = self._open[request_id]
        samples = one.parts[event.request_id]
        if isinstance(event, ScoredPrompt):
            self._happened.append(replace(event, request_id=request_id))
        elif samples is None:
            self._take_first(event, one, request_id)
        elif isinstance(event, NewToken):
            sample = samples[event.sample]
            self._happened.append(NewToken(request_id, sample, event.token))
        else:
            sample = samples[event.sample]
            before = one.first[sample].tokens if one.is_split else ()
            ended = replace(event, request_id=request_id, sample=sample)
            self._end(one, replace(ended, tokens=(*before, *event.tokens)))
        if one.num_left == 0:
            self._forget(request_id)

    def _take_first(self, event: NewToken | Completion, one: _OpenRequest, request_id: int) -> None:
        """First tokens are reported once all of a request are available."""
        if isinstance(event, NewToken):
            return
        one.drawn.append(event)
        if len(one.drawn) < self._num_first(one):
            return
        drawn, one.drawn = sorted(one.drawn, key=lambda ended: ended.sample), []
        if one.is_cancelled:
            one.first = [replace(ended, tokens=()) for ended in drawn[: one.request.n]]
        else:
            allowed = self._allowed(drawn, one, event.request_id)
            one.first += allowed[: one.request.n - len(one.first)]
        del one.parts[event.request_id], self._owners[event.request_id]
        if len(one.first) < one.request.n:
            self._ask_first(one, request_id)
        else:
            self._ask_second(one, request_id)

    def _allowed(
        self, drawn: Sequence[Completion], one: _OpenRequest, part: int
    ) -> list[Completion]:
        banned = one.request.forbidden_first
        kept = [ended for ended in drawn if not {token.id for token in ended.tokens} & banned]
        if not self._redraws and len(kept) < len(drawn):
            # A server that ignores the bias would sample forbidden tokens unnoticed.
            raise SamplerError(
                f"the endpoint sampled one of the token ids {sorted(banned)}, which "
                f"logit_bias=-100 forbids; use one that supports logit_bias",
                part,
            )
        if not kept and one.num_rounds == _MAX_ROUNDS:
            raise SamplerError("the model only samples forbidden first tokens", part)
        return kept

    def _num_first(self, one: _OpenRequest) -> int:
        lacking = one.request.n - len(one.first)
        return lacking * _DRAWS_PER_SAMPLE if self._redraws else lacking

    def _ask_first(self, one: _OpenRequest, request_id: int) -> None:
        request = replace(one.request, max_tokens=1, n=self._num_first(one))
        if self._redraws:
            seed = _seed(one.request.seed, f"round {one.num_rounds}")
            request = replace(request, forbidden_first=frozenset(), seed=seed)
        one.num_rounds += 1
        self._ask(one, request_id, request, None)

    def _ask_second(self, one: _OpenRequest, request_id: int) -> None:
        """Continue from each different first token; a stop token ends the sample at once."""
        request = one.request
        by_token: dict[int, list[int]] = {}
        for sample, ended in enumerate(one.first):
            self._happened += [NewToken(request_id, sample, token) for token in ended.tokens]
            goes_on = ended.finish_reason is FinishReason.LENGTH and request.max_tokens > 1
            if goes_on and not one.is_cancelled:
                by_token.setdefault(ended.tokens[0].id, []).append(sample)
            else:
                reason = FinishReason.CANCELLED if one.is_cancelled else ended.finish_reason
                ended = replace(ended, request_id=request_id, sample=sample, finish_reason=reason)
                self._end(one, ended)
        for token_id, samples in by_token.items():
            rest = replace(
                request,
                prompt=(*request.prompt, token_id),
                n=len(samples),
                max_tokens=request.max_tokens - 1,
                forbidden_first=frozenset(),
                prompt_log_probs=False,
                seed=_seed(request.seed, f"token {token_id}"),
            )
            self._ask(one, request_id, rest, samples)

    def _ask(
        self,
        one: _OpenRequest,
        request_id: int,
        request: Request,
        samples: Sequence[int] | None,
    ) -> None:
        part = self._sampler.submit(request)
        one.parts[part] = samples
        self._owners[part] = request_id

    def _end(self, one: _OpenRequest, ended: Completion) -> None:
        one.num_left -= 1
        self._happened.append(ended)

    def _fail(self, error: SamplerError) -> None:
        """Fail a request because a part of it failed."""
        if error.request_id not in self._owners:
            return
        request_id = self._owners[error.request_id]
        for part in self._open[request_id].parts:
            if part != error.request_id:
                self._sampler.cancel(part)
        self._forget(request_id)
        self._failed.append(SamplerError(str(error), request_id))

    def _forget(self, request_id: int) -> None:
        self._open.pop(request_id, None)
        self._owners = {part: one for part, one in self._owners.items() if one != request_id}


def _seed(seed: int, name: str) -> int:
    """Return the seed of a part of a request."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
