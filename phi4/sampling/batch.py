"""The loops around a sampler: events of many requests as they come, or whole answers.

The decision: requests are read as they are needed, so a million of them cost no more memory than
the few that are open.
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
"""Requests that are in a sampler at once; it queues those that it has no memory for."""


@dataclass(frozen=True)
class Answer:
    """All that came of a request.

    Attributes:
        index: of the request among those that were asked.
        request: what was asked.
        prompt: the prompt's tokens with their log-probs, where the request asks for them.
        completions: by index of the sample, all n.
    """

    index: int
    request: Request
    prompt: tuple[PromptToken, ...]
    completions: tuple[Completion, ...]


def events(
    sampler: Sampler, requests: Iterable[Request], max_open: int = MAX_OPEN
) -> Generator[tuple[int, Event], None, None]:
    """Yield what happens, each event with the index of its request, until all have ended.

    A caller that stops reading cancels the rest. The sampler has no other user meanwhile.

    Raises:
        ConfigError: a request is impossible. The first `max_open` are looked at before any output.
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
            # The reader has left, or is told of the failure that came first.
            with suppress(SamplerError):
                if not _step(sampler, num_left):
                    # A sampler that was closed meanwhile says no more.
                    break


def answers(
    sampler: Sampler, requests: Iterable[Request], max_open: int = MAX_OPEN
) -> Iterator[Answer]:
    """Yield answers in the order in which they are complete. As `events` otherwise."""
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
    """One step; takes what has ended, or failed, out of `num_left`."""
    try:
        happened = list(sampler.step())
    except SamplerError as error:
        num_left.pop(error.request_id, None)
        raise
    except BaseException:
        # Interrupted in the middle of a step, or broken: it can take no other one.
        num_left.clear()
        raise
    for event in happened:
        if isinstance(event, Completion):
            num_left[event.request_id] -= 1
            if not num_left[event.request_id]:
                del num_left[event.request_id]
    return happened
