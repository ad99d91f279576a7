"""Loops around a sampler: stream events of many requests, or collect complete answers.

Requests are read lazily, so a million of them use no more memory than the open ones.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from phi4.errors import SamplerError
from phi4.sampling.protocol import (
    Completion,
    Event,
    PromptToken,
    Request,
    Sampler,
    ScoredPrompt,
)

MAX_OPEN = 1024
"""Number of requests in a sampler at once; it queues those that do not fit in memory."""


@dataclass(frozen=True)
class Answer:
    """All results of a request.

    Attributes:
        index: index of the request.
        request: the request.
        prompt: the prompt's tokens with their log-probs, if requested.
        completions: by index of the sample, all n.
    """

    index: int
    request: Request
    prompt: tuple[PromptToken, ...]
    completions: tuple[Completion, ...]


def events(
    sampler: Sampler, requests: Iterable[Request], max_open: int = MAX_OPEN
) -> Generator[tuple[int, Event], None, None]:
    """Yield events, each with the index of its request, until all have ended.

    A caller that stops reading cancels the rest. The sampler must have no other user meanwhile.

    Raises:
        ConfigError: a request is invalid. The first `max_open` are checked before any output.
        SamplerError: a request failed; the others are cancelled.
    """
    coming = enumerate(requests)
    indices: dict[int, int] = {}
    num_left: dict[int, int] = {}
    try:
        while True:
            for index, request in islice(coming, max_open - len(num_left)):
                request_id = sampler.submit(request)
                indices[request_id], num_left[request_id] = index, request.n
            if not num_left:
                return
            yield from [(indices[event.request_id], event) for event in _step(sampler, num_left)]
            indices = {request_id: indices[request_id] for request_id in num_left}
    finally:
        for request_id in num_left:
            sampler.cancel(request_id)
        while num_left:
            # The reader has stopped, or gets the error that came first.
            with suppress(SamplerError):
                if not _step(sampler, num_left):
                    # A sampler that was closed meanwhile returns no more events.
                    break


def answers(
    sampler: Sampler, requests: Iterable[Request], max_open: int = MAX_OPEN
) -> Iterator[Answer]:
    """Yield answers in the order in which they complete; otherwise as `events`."""
    asked: dict[int, Request] = {}
    prompts: dict[int, tuple[PromptToken, ...]] = {}
    ended: dict[int, list[Completion]] = {}

    def noted() -> Iterator[Request]:
        for index, request in enumerate(requests):
            asked[index], prompts[index], ended[index] = request, (), []
            yield request

    for index, event in events(sampler, noted(), max_open):
        if isinstance(event, ScoredPrompt):
            prompts[index] = event.tokens
        elif isinstance(event, Completion):
            ended[index].append(event)
            if len(ended[index]) == asked[index].n:
                completions = sorted(ended.pop(index), key=lambda completion: completion.sample)
                yield Answer(index, asked.pop(index), prompts.pop(index), tuple(completions))


def _step(sampler: Sampler, num_left: dict[int, int]) -> list[Event]:
    """Take one step; remove ended or failed requests from `num_left`."""
    try:
        happened = list(sampler.step())
    except SamplerError as error:
        num_left.pop(error.request_id, None)
        raise
    except BaseException:
        # Interrupted in the middle of a step, or failed: the sampler cannot be used further.
        num_left.clear()
        raise
    for event in happened:
        if isinstance(event, Completion):
            num_left[event.request_id] -= 1
            if not num_left[event.request_id]:
                del num_left[event.request_id]
    return happened
