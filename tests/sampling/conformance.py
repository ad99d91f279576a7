"""What holds for every sampler's events, whatever the model says."""

from collections.abc import Iterable

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import (
    Completion,
    Event,
    FinishReason,
    NewToken,
    Request,
    Sampler,
    ScoredPrompt,
)


def run(sampler: Sampler, *requests: Request) -> dict[int, list[Event]]:
    """Events of requests that are in the sampler together, by position among them."""
    ids = [sampler.submit(request) for request in requests]
    happened: dict[int, list[Event]] = {request_id: [] for request_id in ids}
    left = sum(request.n for request in requests)
    while left:
        for event in sampler.step():
            happened[event.request_id].append(event)
            left -= isinstance(event, Completion)
    assert not sampler.step()
    return dict(enumerate(happened.values()))


def completions(happened: Iterable[Event]) -> list[Completion]:
    """By index of the sample."""
    ended = [event for event in happened if isinstance(event, Completion)]
    return sorted(ended, key=lambda completion: completion.sample)


def drawn_ids(happened: Iterable[Event]) -> list[list[int]]:
    """Ids of every sample."""
    return [[token.id for token in ended.tokens] for ended in completions(happened)]


def check_events(request: Request, happened: list[Event], tokenizer: Tokenizer) -> None:
    """The law of a request's events: order, ends, forced tokens, stops, lengths."""
    scored = [event for event in happened if isinstance(event, ScoredPrompt)]
    assert len(scored) == request.prompt_log_probs and happened[: len(scored)] == scored
    for event in scored:
        assert tuple(token.id for token in event.tokens) == request.prompt
        assert [token.log_prob is None for token in event.tokens][:2] in ([True], [True, False])
    ended = completions(happened)
    assert [completion.sample for completion in ended] == list(range(request.n))
    for completion in ended:
        of_sample = [
            event for event in happened[len(scored) :] if event.sample == completion.sample
        ]
        assert of_sample[-1] is completion
        assert all(isinstance(event, NewToken) for event in of_sample[:-1])
        assert tuple(event.token for event in of_sample[:-1]) == completion.tokens
        _check_completion(request, completion, tokenizer)


def _check_completion(request: Request, completion: Completion, tokenizer: Tokenizer) -> None:
    ids = [token.id for token in completion.tokens]
    if completion.finish_reason is not FinishReason.CANCELLED:
        assert tuple(ids[: len(request.forced)]) == request.forced[: len(ids)]
    assert not request.forbidden_first.intersection(ids[:1])
    assert not request.stop_ids.intersection(ids[:-1])
    before, whole = (b"".join(map(tokenizer.bytes_of, part)) for part in (ids[:-1], ids))
    assert not any(stop in before for stop in request.stop_strings)
    assert len(ids) <= request.max_tokens
    match completion.finish_reason, completion.matched:
        case FinishReason.STOP, int(matched):
            assert matched in request.stop_ids and ids[-1] == matched
        case FinishReason.STOP, bytes(matched):
            assert matched in request.stop_strings and matched in whole
        case FinishReason.LENGTH, None:
            assert len(ids) == request.max_tokens
            assert not any(stop in whole for stop in request.stop_strings)
        case reason, None:
            assert reason is not FinishReason.LENGTH
