"""A sampler over HTTP to our own server gives what the sampler behind the server gives itself."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.errors import ConfigError, SamplerError
from phi4.pts.search.command import search_and_write
from phi4.sampling.endpoint import Endpoint, PromptForm
from phi4.sampling.http import HttpSampler
from phi4.sampling.protocol import Completion, Event, FinishReason, Request, ScoredPrompt
from phi4.sampling.scripted import ScriptedSampler
from tests.pts.search.planted import LastLetterOracle, PlantedScript, small_tokenizer
from tests.pts.search.test_search import job
from tests.sampling.conformance import check_events, completions, run
from tests.sampling.endpoint_server import serving
from tests.serve.openai_api.known_model import BREAKS, TOKENIZER, A, B, C, D, E, sampler
from tests.support.served import MODEL_NAME, Served, served


def endpoint(server: Served, **fields: object) -> Endpoint:
    where = {"base_url": f"{server.url}/v1", "model": MODEL_NAME, "form": PromptForm.PHI4}
    return Endpoint(**where | fields)


@pytest.fixture(scope="module")
def remote(server) -> Iterator[HttpSampler]:
    with closing(HttpSampler(endpoint(server), TOKENIZER)) as one:
        yield one


def check_same(request: Request, found: list[Event], expected: list[Event]) -> None:
    """The same prompt's scores, tokens and ends; the order among samples is free."""
    check_events(request, found, TOKENIZER)

    def told(happened: list[Event]) -> tuple:
        scored = [event.tokens for event in happened if isinstance(event, ScoredPrompt)]
        ended = completions(happened)
        return scored, [(c.sample, c.tokens, c.finish_reason, c.matched) for c in ended]

    assert told(found) == told(expected)


SCORED = {"log_probs": True, "num_top_log_probs": 2}
REQUESTS = [
    Request(prompt=(A, B), max_tokens=0, prompt_log_probs=True, num_top_log_probs=1),
    Request(prompt=(A, B, D, A), max_tokens=3, prompt_log_probs=True, n=3, **SCORED),
    Request(prompt=(A,), max_tokens=2, prompt_log_probs=True),
    Request(prompt=(A,), max_tokens=4, forced=(E, B), n=2, temperature=0.5, top_k=2, **SCORED),
    Request(prompt=(A,), max_tokens=2, forced=(200,), prompt_log_probs=True, **SCORED),
    # The model gives the forced token no chance, and has one other.
    Request(prompt=(D,), max_tokens=2, forced=(200,), **SCORED),
    Request(prompt=(A,), max_tokens=2, forced=(B, A)),
    Request(prompt=(A,), max_tokens=9, n=9, forbidden_first=frozenset((B, C)), **SCORED),
    Request(prompt=(A,), max_tokens=9, temperature=0.0, log_probs=True),
    Request(prompt=(A,), max_tokens=9, n=3, logit_bias={E: 1e6, B: -1e6}, **SCORED),
    Request(prompt=(A,), max_tokens=30, n=3, stop_strings=(b"ca", b"\xff"), stop_ids={E}, seed=4),
    Request(prompt=(A,), max_tokens=30, n=3, stop_strings=(b"ca", b"ab")),
    # Nothing but what the request says ends a text.
    Request(prompt=(ord("x"),), max_tokens=12, min_p=0.2, seed=2**63 - 1),
    Request(prompt=(ord("y"),), max_tokens=12, stop_ids={TOKENIZER.eod_id}, log_probs=True),
    Request(prompt=(TOKENIZER.im_end_id, 255), max_tokens=5, top_p=0.7, temperature=2.0, **SCORED),
]


def test_every_kind_of_request_gives_what_the_sampler_gives(remote) -> None:
    requests = [replace(one, stop_ids=frozenset(one.stop_ids)) for one in REQUESTS]
    found, expected = run(remote, *requests), run(sampler(), *requests)
    for number, request in enumerate(requests):
        check_same(request, found[number], expected[number])


IDS = st.sampled_from([A, B, C, D, E])


@settings(max_examples=25)
@given(
    prompt=st.lists(IDS, min_size=1, max_size=3).map(tuple),
    max_tokens=st.integers(2, 6),
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.6, 1.0]),
    top_k=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
    forced=st.lists(st.just(B), max_size=2).map(tuple),
    forbidden_first=st.sets(st.sampled_from([C, D])).map(frozenset),
    stop_strings=st.sampled_from([(), (b"ac",), (b"b", b"cc")]),
    log_probs=st.booleans(),
    prompt_log_probs=st.booleans(),
)
def test_any_request_gives_what_the_sampler_gives(remote, **fields: object) -> None:
    request = Request(num_top_log_probs=2 * bool(fields["log_probs"]), **fields)
    if request.prompt[-1] in (C, D):
        # These go on with one or two letters only, which a ban may leave nothing of.
        request = replace(request, forbidden_first=frozenset())
    check_same(request, run(remote, request)[0], run(sampler(), request)[0])


def test_many_requests_at_once(remote) -> None:
    requests = [Request(prompt=(A,), max_tokens=8, seed=seed, n=2) for seed in range(40)]
    found, expected = run(remote, *requests), run(sampler(), *requests)
    for number, request in enumerate(requests):
        check_same(request, found[number], expected[number])


def test_cancel_frees_the_server(server, remote) -> None:
    request = Request(prompt=(A,), max_tokens=200, n=4)
    number = remote.submit(request)
    happened = list(remote.step())
    remote.cancel(number)
    while more := remote.step():
        happened += more
    check_events(request, happened, TOKENIZER)
    assert {event.finish_reason for event in happened if isinstance(event, Completion)} <= {
        FinishReason.CANCELLED,
        FinishReason.LENGTH,
    }


def test_what_the_server_refuses_or_fails_on_is_an_error_of_its_request(remote) -> None:
    other = Request(prompt=(A,), max_tokens=3, temperature=0.0)
    kept = remote.submit(other)
    happened: list[Event] = []
    for request, message in (
        (Request(prompt=(A,), max_tokens=999), "answered 400: .*context_length_exceeded"),
        (Request(prompt=(BREAKS,), max_tokens=9), "failed during the answer: .*no entry"),
    ):
        bad = remote.submit(request)
        with pytest.raises(SamplerError, match=message) as caught:
            while more := remote.step():
                happened += more
        assert caught.value.request_id == bad
    while more := remote.step():
        happened += more
    check_events(other, [event for event in happened if event.request_id == kept], TOKENIZER)


def test_more_likeliest_tokens_than_the_server_gives_are_refused(remote) -> None:
    request = Request(prompt=(A,), max_tokens=1, log_probs=True, num_top_log_probs=21)
    with pytest.raises(ConfigError, match="cannot return more than 20 of num_top_log_probs"):
        remote.submit(request)


@pytest.mark.parametrize(
    ("fields", "lists", "message"),
    [
        ({"forced": (B,)}, {}, "ignores first_token_forced"),
        ({"forbidden_first": frozenset((A,))}, {}, "ignores first_tokens_forbidden"),
        ({"log_probs": True}, {"token_logprobs": [-1.0]}, "sends no sampled_logprobs"),
        (
            {"prompt_log_probs": True},
            {"tokens": [f"token_id:{A}"], "token_logprobs": [-1.0], "top_logprobs": None},
            "does not score the prompt",
        ),
    ],
)
def test_server_that_ignores_our_fields_is_noticed(fields, lists, message: str) -> None:
    def reply(path: str, body: dict):
        yield {"choices": [{"index": 0, "text": "a", "token_ids": [A], "logprobs": lists}]}

    with serving(reply) as other:
        where = Endpoint(base_url=other.base_url, model="phi", form=PromptForm.PHI4)
        with closing(HttpSampler(where, TOKENIZER)) as over_http:
            over_http.submit(Request(prompt=(C, D), max_tokens=2, **fields))
            with pytest.raises(SamplerError, match=message):
                while over_http.step():
                    pass


def test_pivotal_search_over_the_server_finds_what_it_finds_without(tmp_path) -> None:
    tokenizer, found = small_tokenizer(), {}
    direct = ScriptedSampler(PlantedScript(tokenizer), tokenizer)
    behind = ScriptedSampler(PlantedScript(tokenizer), tokenizer)
    with (
        served(behind, tokenizer) as server,
        closing(HttpSampler(endpoint(server), tokenizer)) as over_http,
    ):
        for name, one in (("direct", direct), ("served", over_http)):
            search = job(tmp_path / name, num=1)
            report = search_and_write(search, one, tokenizer, LastLetterOracle())
            found[name] = (tmp_path / name / "pivots.jsonl").read_bytes()
    assert report.pivots > 0
    assert found["served"] == found["direct"]
