"""The loops around a sampler: all answers, bounded memory, nothing left behind."""

import pytest

from phi4.errors import ConfigError, SamplerError
from phi4.sampling.batch import answers, events
from phi4.sampling.protocol import Completion, FinishReason, Request
from phi4.sampling.scripted import ScriptedSampler


def count_up(ids: tuple[int, ...]) -> dict[int, float]:
    """One more than the last id; nothing after 100."""
    return {ids[-1] + 1: 1.0} if ids[-1] < 100 else {}


@pytest.fixture
def sampler(tokenizer) -> ScriptedSampler:
    return ScriptedSampler(count_up, tokenizer)


def lengths(*max_tokens: int, n: int = 1) -> list[Request]:
    return [Request(prompt=(9 + number,), max_tokens=m, n=n) for number, m in enumerate(max_tokens)]


def test_answers_come_as_they_are_complete(sampler) -> None:
    requests = lengths(3, 1, 2, n=2)
    found = list(answers(sampler, requests))
    assert [answer.index for answer in found] == [1, 2, 0]
    for answer in found:
        assert answer.request == requests[answer.index]
        assert [completion.sample for completion in answer.completions] == [0, 1]
        first = answer.request.prompt[0] + 1
        for completion in answer.completions:
            ids = [token.id for token in completion.tokens]
            assert ids == list(range(first, first + answer.request.max_tokens))


def test_prompt_scores_are_part_of_an_answer(sampler) -> None:
    [answer] = answers(sampler, [Request(prompt=(4, 5, 6), max_tokens=0, prompt_log_probs=True)])
    assert [token.log_prob for token in answer.prompt] == [None, 0, 0]
    assert answer.completions[0].finish_reason is FinishReason.LENGTH


def test_requests_are_read_as_they_are_needed(sampler) -> None:
    num_read, num_answered = 0, 0

    def many():
        nonlocal num_read
        for request in lengths(*[9, 7, 8] * 10):
            num_read += 1
            yield request

    for _ in answers(sampler, many(), max_open=4):
        num_answered += 1
        # Those of the same step may be counted as read before they are yielded.
        assert num_read <= num_answered + 2 * 4
    assert num_read == num_answered == 30


def test_reader_that_leaves_cancels_the_rest(sampler) -> None:
    for events_read in range(1, 7):
        reading = events(sampler, lengths(1, 5, 5, n=2))
        for _ in range(events_read):
            next(reading)
        reading.close()
        assert not sampler.step()
        # Nothing of the requests that were left disturbs the next ones.
        assert len(list(answers(sampler, lengths(2, 2)))) == 2


def test_reader_that_leaves_a_closed_sampler_does_not_wait_for_it(sampler) -> None:
    reading = events(sampler, lengths(5, 5))
    next(reading)
    sampler.close()
    reading.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_sampler_that_was_interrupted_in_a_step_is_not_asked_for_more(
    sampler, monkeypatch, error
) -> None:
    reading = events(sampler, lengths(5, 5))
    next(reading)
    calls = []

    def step() -> None:
        calls.append(1)
        raise error("in the middle")

    monkeypatch.setattr(sampler, "step", step)
    with pytest.raises(error, match="in the middle"):
        list(reading)
    assert len(calls) == 1


def test_requests_that_nobody_reads_are_not_drawn_to_their_end(tokenizer) -> None:
    asked = []
    sampler = ScriptedSampler(lambda ids: asked.append(ids) or {1: 1.0}, tokenizer)
    reading = events(sampler, lengths(50, 50))
    next(reading)
    reading.close()
    assert len(asked) == 2


def test_failed_request_ends_the_others(sampler) -> None:
    failing = Request(prompt=(99,), max_tokens=9)
    read = []
    with pytest.raises(SamplerError, match=r"no entry for ids \[99, 100\]"):
        read.extend(events(sampler, [*lengths(5), failing]))
    assert not sampler.step()


def test_impossible_request_is_refused_before_any_output(sampler) -> None:
    read = []
    with pytest.raises(ConfigError, match="n=0"):
        for index, event in events(sampler, [*lengths(5, 5), *lengths(1, n=0)]):
            read.append((index, event))
    assert read == []
    assert not sampler.step()


def test_events_are_told_by_the_index_of_their_request(sampler) -> None:
    read = list(events(sampler, lengths(2, 1), max_open=1))
    assert [index for index, _ in read] == [0, 0, 0, 1, 1]
    assert [isinstance(event, Completion) for _, event in read] == [False, False, True, False, True]
