"""Forbidding the first token at an endpoint that can forbid tokens only at every position.

The decision: such a request becomes two. The first draws one token of each sample under a bias;
the second goes on from each different token without it. The samples are draws of the same
distribution as those of one request, and the search sees one request either way.
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
    Token,
)


@dataclass
class _OpenRequest:
    """A request, and those below that it became.

    Attributes:
        request: as it was asked.
        first_part: the request below that draws first tokens; None without one, or behind it.
        parts: open requests below, each with the samples that it draws.
        first: first tokens, by sample, once the first part drew them.
        num_left: samples without a completion.
        is_cancelled: no second part is asked for.
    """

    request: Request
    first_part: int | None
    parts: dict[int, Sequence[int]]
    first: dict[int, Token] = field(default_factory=dict)
    num_left: int = 0
    is_cancelled: bool = False


class TwoRequestSampler:
    """A `Sampler` over one that refuses `forbidden_first` with more than one new token.

    Args:
        sampler: below; this one closes it.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._num_requests = 0
        self._open: dict[int, _OpenRequest] = {}
        self._owners: dict[int, int] = {}
        self._happened: list[Event] = []

    @property
    def limits(self) -> ModelLimits:
        """See `Sampler.limits`."""
        return self._sampler.limits

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`.

        Raises:
            ConfigError: stop strings together with a forbidden first token are asked for, too.
        """
        is_split = bool(request.forbidden_first) and not request.forced and request.max_tokens > 1
        if is_split and request.stop_strings:
            raise ConfigError(
                "an endpoint cannot forbid the first token and stop at a string, which may begin "
                "with it; leave stop_strings out"
            )
        part = self._sampler.submit(replace(request, max_tokens=1) if is_split else request)
        request_id = self._num_requests
        self._num_requests += 1
        parts = {part: range(request.n)}
        self._open[request_id] = _OpenRequest(
            request, part if is_split else None, parts, num_left=request.n
        )
        self._owners[part] = request_id
        return request_id

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`."""
        failed: SamplerError | None = None
        try:
            events = self._sampler.step()
        except SamplerError as error:
            events, failed = (), error
        for event in events:
            # A request that failed is gone; what is still said of its parts is dropped.
            if event.request_id in self._owners:
                try:
                    self._take(event, self._owners[event.request_id])
                except SamplerError as error:
                    failed = error
                    self._sampler.cancel(event.request_id)
        if failed is not None and failed.request_id in self._owners:
            request_id = self._owners[failed.request_id]
            self._forget(request_id)
            raise SamplerError(str(failed), request_id) from None
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
        if isinstance(event, ScoredPrompt):
            self._happened.append(replace(event, request_id=request_id))
            return
        sample = one.parts[event.request_id][event.sample]
        if isinstance(event, NewToken):
            if event.request_id == one.first_part:
                _check(event.token, one.request, event.request_id)
            self._happened.append(NewToken(request_id, sample, event.token))
            return
        is_first = event.request_id == one.first_part
        if is_first and event.finish_reason is FinishReason.LENGTH:
            one.first[sample] = event.tokens[0]
        else:
            before = (one.first[sample],) if sample in one.first else ()
            self._end(one, replace(event, request_id=request_id, sample=sample), before)
        if one.num_left == 0:
            self._forget(request_id)
        elif is_first and len(one.first) == one.num_left:
            self._ask_second(one, request_id)

    def _end(self, one: _OpenRequest, ended: Completion, before: tuple[Token, ...]) -> None:
        one.num_left -= 1
        self._happened.append(replace(ended, tokens=(*before, *ended.tokens)))

    def _ask_second(self, one: _OpenRequest, request_id: int) -> None:
        request = one.request
        del one.parts[one.first_part], self._owners[one.first_part]
        one.first_part = None
        by_token: dict[int, list[int]] = {}
        for sample in sorted(one.first):
            by_token.setdefault(one.first[sample].id, []).append(sample)
        for token_id, samples in by_token.items():
            if one.is_cancelled:
                for sample in samples:
                    ended = Completion(request_id, sample, (), FinishReason.CANCELLED)
                    self._end(one, ended, (one.first[sample],))
                continue
            part = self._sampler.submit(
                replace(
                    request,
                    prompt=(*request.prompt, token_id),
                    n=len(samples),
                    max_tokens=request.max_tokens - 1,
                    forbidden_first=frozenset(),
                    prompt_log_probs=False,
                    seed=_seed(request.seed, token_id),
                )
            )
            one.parts[part] = samples
            self._owners[part] = request_id
        if one.num_left == 0:
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        for part in self._open.pop(request_id).parts:
            del self._owners[part]


def _check(token: Token, request: Request, part: int) -> None:
    """A server that does not know the bias would draw what is forbidden, unnoticed."""
    if token.id in request.forbidden_first:
        raise SamplerError(
            f"the endpoint drew token id {token.id}, which logit_bias=-100 forbids; use one that "
            "takes logit_bias",
            part,
        )


def _seed(seed: int, token_id: int) -> int:
    """Of the second part behind a token."""
    digest = hashlib.blake2b(f"{seed} {token_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
