"""Searching behind an endpoint: a forbidden first token in two requests, and what is refused."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from phi4.errors import ConfigError, SamplerError
from phi4.pts.search.command import search_and_write
from phi4.pts.search.endpoint import check_endpoint
from phi4.pts.search.rows import read_pivots
from phi4.pts.search.two_requests import TwoRequestSampler
from phi4.sampling.endpoint import Endpoint, PromptForm
from phi4.sampling.http import HttpSampler
from phi4.sampling.protocol import Completion, FinishReason, Request
from phi4.sampling.scripted import ScriptedSampler
from tests.pts.search.endpoint import replying
from tests.pts.search.planted import (
    FORK,
    LAST,
    MAX_TOKENS,
    TURN,
    LastLetterOracle,
    PlantedScript,
    RecordingSampler,
    questions,
    true_effects,
)
from tests.pts.search.test_search import job
from tests.sampling.conformance import check_events, completions, drawn_ids, run
from tests.sampling.endpoint_server import EndpointServer, serving

A, B, C, END = 65, 66, 67, 90


@contextmanager
def endpoint(script, tokenizer, lacks: str = "") -> Iterator[tuple[HttpSampler, EndpointServer]]:
    with serving(replying(script, tokenizer, lacks)) as server:
        where = Endpoint(base_url=server.base_url, model="phi", form=PromptForm.IDS)
        with closing(HttpSampler(where, tokenizer)) as sampler:
            yield sampler, server


def letters(ids: tuple[int, ...]) -> dict[int, float]:
    """A, B, or the end, with chances that depend on the last letter; never thrice the same."""
    return {A: 0.3, B: 0.3, C: 0.2, END: 0.2} if ids[-1] != A else {A: 0.5, B: 0.2, END: 0.3}


def asking(**fields: object) -> Request:
    wanted = {"prompt": (7,), "max_tokens": 6, "n": 40, "seed": 5, "stop_ids": frozenset((END,))}
    return Request(**wanted | {"forbidden_first": frozenset((A,))} | fields)


def test_first_token_is_forbidden_and_later_ones_are_not(tokenizer) -> None:
    request = asking()
    with endpoint(letters, tokenizer) as (below, server):
        with pytest.raises(ConfigError, match="cannot forbid the first token only"):
            below.submit(request)
        happened = run(TwoRequestSampler(below), request)[0]
    check_events(request, happened, tokenizer)
    drawn = drawn_ids(happened)
    assert A not in {ids[0] for ids in drawn} and any(A in ids for ids in drawn)
    assert {B, C, END} == {ids[0] for ids in drawn}
    bodies = [body for _, body, _ in server.asked]
    assert [body["max_tokens"] for body in bodies] == [1, 5, 5]
    assert [body["logit_bias"] for body in bodies if "logit_bias" in body] == [{"65": -100}]
    counts = Counter(ids[0] for ids in drawn)
    assert {tuple(body["prompt"]): body["n"] for body in bodies[1:]} == {
        (7, B): counts[B],
        (7, C): counts[C],
    }
    assert len({body["seed"] for body in bodies}) == 3


@pytest.mark.parametrize("redraws", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_shares_are_those_of_one_request(tokenizer, redraws: bool, temperature: float) -> None:
    """On a sampler that can do both: the same distribution, told by its tokens."""
    request, wanted = asking(n=1000, max_tokens=2, temperature=temperature), {}
    for name in ("one", "two"):
        below = ScriptedSampler(letters, tokenizer)
        sampler = TwoRequestSampler(below, redraws) if name == "two" else below
        counts = Counter(map(tuple, drawn_ids(run(sampler, request)[0])))
        wanted[name] = {ids: num / request.n for ids, num in counts.items()}
    assert wanted["one"].keys() == wanted["two"].keys()
    for ids, share in wanted["one"].items():
        assert share == pytest.approx(wanted["two"][ids], abs=0.05)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_redraws_stay_in_the_nucleus_where_a_ban_would_leave_it(tokenizer, max_tokens) -> None:
    """Top-p keeps A, B and C; without A, a ban would let the end in."""
    request = asking(top_p=0.75, n=60, max_tokens=max_tokens)
    banned = run(ScriptedSampler(letters, tokenizer), request)[0]
    assert END in {ids[0] for ids in drawn_ids(banned)}
    found = run(TwoRequestSampler(ScriptedSampler(letters, tokenizer), redraws=True), request)[0]
    check_events(request, found, tokenizer)
    counts = Counter(ids[0] for ids in drawn_ids(found))
    assert counts.keys() == {B, C} and counts[B] > counts[C] > 10


def test_redraws_go_on_until_there_are_enough_and_then_give_up(tokenizer) -> None:
    def rarely(ids: tuple[int, ...]) -> dict[int, float]:
        return {A: 0.98, B: 0.02} if len(ids) == 1 else {END: 1.0}

    below = RecordingSampler(tokenizer, rarely)
    sampler = TwoRequestSampler(below, redraws=True)
    assert drawn_ids(run(sampler, asking(n=5))[0]) == [[B, END]] * 5
    # No round repeats the draws of another one.
    assert len({request.seed for request in below.requests}) == len(below.requests) > 3
    with pytest.raises(SamplerError, match="only samples forbidden first tokens") as caught:
        run(sampler, asking(n=5, forbidden_first=frozenset((A, B))))
    assert caught.value.request_id == 1


def test_other_requests_pass_as_they_are(tokenizer) -> None:
    requests = (
        asking(),
        asking(forbidden_first=frozenset(), log_probs=True),
        asking(forced=(B,)),
        asking(max_tokens=1),
        asking(prompt=(7, 8), prompt_log_probs=True, log_probs=True),
    )
    sampler = TwoRequestSampler(ScriptedSampler(letters, tokenizer))
    found = run(sampler, *requests)
    for index, request in enumerate(requests):
        check_events(request, found[index], tokenizer)
    assert {ids[0] for ids in drawn_ids(found[2])} == {B}


def test_stop_strings_are_refused(tokenizer) -> None:
    sampler = TwoRequestSampler(ScriptedSampler(letters, tokenizer))
    with pytest.raises(ConfigError, match="remove stop_strings"):
        sampler.submit(asking(stop_strings=(b"A",)))
    assert not sampler.step()


@pytest.mark.parametrize("redraws", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_cancel_ends_every_sample_once(tokenizer, steps: int, redraws: bool) -> None:
    sampler = TwoRequestSampler(ScriptedSampler(letters, tokenizer), redraws)
    request_id = sampler.submit(asking(max_tokens=50))
    happened = [event for _ in range(steps) for event in sampler.step()]
    sampler.cancel(request_id)
    while more := sampler.step():
        happened += more
    ended = [event for event in happened if isinstance(event, Completion)]
    assert sorted(one.sample for one in ended) == list(range(40))
    assert FinishReason.CANCELLED in {one.finish_reason for one in ended}
    sampler.cancel(request_id)
    sampler.close()


def test_server_that_ignores_the_ban_is_an_error_of_its_request(tokenizer) -> None:
    with endpoint(letters, tokenizer, lacks="logit_bias") as (below, _):
        sampler = TwoRequestSampler(below)
        sampler.submit(asking(forbidden_first=frozenset()))
        bad = sampler.submit(asking())
        other = sampler.submit(asking(forbidden_first=frozenset()))
        happened, failed = [], []
        while len(completions(happened)) < 80 or not failed:
            try:
                happened += sampler.step()
            except SamplerError as error:
                failed.append(error)
    assert [error.request_id for error in failed] == [bad]
    assert "sampled one of the token ids [65], which logit_bias=-100 forbids" in str(failed[0])
    assert {event.request_id for event in happened if event.request_id != bad} == {0, other}


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("token_ids", "needs token ids or log_probs"),
        ("logprobs", "needs token ids or log_probs"),
        ("logit_bias", "which logit_bias=-100 forbids; use one that supports logit_bias"),
    ],
)
def test_endpoint_without_a_need_is_refused_before_the_search(tokenizer, lacks, message) -> None:
    def sure(ids: tuple[int, ...]) -> dict[int, float]:
        return {A: 0.9, B: 0.1}

    with endpoint(sure, tokenizer, lacks) as (below, server):
        with pytest.raises(ConfigError) as caught:
            check_endpoint(TwoRequestSampler(below), (7,))
        assert message in str(caught.value)
        assert len(server.asked) <= 2
        assert {body["max_tokens"] for _, body, _ in server.asked} == {1}


def test_search_behind_an_endpoint_finds_the_planted_pivots(tokenizer, tmp_path) -> None:
    search = job(tmp_path, num=1)
    with endpoint(PlantedScript(tokenizer), tokenizer) as (below, server):
        sampler = TwoRequestSampler(below)
        check_endpoint(sampler, questions(1)[0].prompt)
        report = search_and_write(search, sampler, tokenizer, LastLetterOracle())
    pivots = list(read_pivots(tmp_path / "pivots.jsonl"))
    assert report.pivots == len(pivots) > 0
    assert {one.position for one in pivots} <= {FORK, TURN, LAST}
    for one in pivots:
        effect = dict(true_effects(one.answer_ids[:-1]))[one.position]
        assert effect * one.dp_at_confirmation > 0
    assert all(one.counterpart.trials >= 8 for one in pivots if one.counterpart)
    biased = [body for _, body, _ in server.asked if "logit_bias" in body]
    assert biased and all(body["max_tokens"] == 1 for body in biased)
    assert max(body["max_tokens"] for _, body, _ in server.asked) == MAX_TOKENS
