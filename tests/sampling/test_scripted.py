"""A sampler with known probabilities: each field of a request has its exact effect."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.errors import ConfigError, SamplerError
from phi4.sampling.protocol import Completion, FinishReason, Request, ScoredPrompt
from phi4.sampling.scripted import AnswerTable, ScriptedSampler
from phi4.sampling.text import completion_text, end_ids, text_pieces
from tests.sampling.conformance import check_events, completions, drawn_ids, run

CHAIN = {
    0: {1: 0.5, 2: 0.3, 3: 0.15, 4: 0.05},
    1: {0: 0.9, 5: 0.1},
    2: {2: 0.6, 0: 0.4},
    3: {0: 1.0, 9: 0.0},
    4: {1: 0.5, 0: 0.5},
    5: {5: 0.7, 1: 0.3},
}
FIRST = CHAIN[0]


def chain(ids: tuple[int, ...]) -> dict[int, float]:
    """The next id depends on the last one."""
    return CHAIN[ids[-1]]


@pytest.fixture
def sampler(tokenizer) -> ScriptedSampler:
    return ScriptedSampler(chain, tokenizer, max_sequence_tokens=64)


def one(sampler: ScriptedSampler, **fields: object) -> Completion:
    """The only completion of a request after id 0."""
    request = Request(**{"prompt": (0,), "max_tokens": 1} | fields)
    [completion] = completions(run(sampler, request)[0])
    return completion


def support(sampler: ScriptedSampler, **fields: object) -> dict[int, float]:
    """Ids that 300 samples of one token had, and their probabilities when sampled."""
    request = Request(prompt=(0,), max_tokens=1, n=300, log_probs=True, **fields)
    tokens = [completion.tokens[0] for completion in completions(run(sampler, request)[0])]
    return {token.id: math.exp(token.sampled_log_prob) for token in tokens}


def shares(*ids: int, temperature: float = 1.0) -> dict[int, float]:
    """Probabilities after id 0 when only some ids are left."""
    weights = {i: FIRST[i] ** (1 / temperature) for i in ids}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, shares(1, 2, 3, 4)),
        ({"temperature": 2.0}, shares(1, 2, 3, 4, temperature=2)),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"temperature": 1e-6}, {1: 1.0}),
        ({"top_k": 2}, shares(1, 2)),
        ({"top_k": 99}, shares(1, 2, 3, 4)),
        ({"top_p": 0.49}, {1: 1.0}),
        ({"top_p": 0.79}, shares(1, 2)),
        ({"top_p": 0.81}, shares(1, 2, 3)),
        # Of what top_k leaves, token 1 alone has 0.625.
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),
        ({"top_k": 2, "top_p": 0.63}, shares(1, 2)),
        # At temperature 2 tokens 1 and 2 have 0.673 of the mass.
        ({"temperature": 2.0, "top_p": 0.68}, shares(1, 2, 3, temperature=2)),
        ({"min_p": 0.29}, shares(1, 2, 3)),
        ({"min_p": 0.31}, shares(1, 2)),
        ({"min_p": 1.0}, {1: 1.0}),
        ({"min_p": 0.31, "temperature": 2.0}, shares(1, 2, 3, 4, temperature=2)),
        ({"forbidden_first": frozenset((1, 4))}, shares(2, 3)),
        ({"forbidden_first": frozenset((1,)), "temperature": 0.0}, {2: 1.0}),
        (
            {"logit_bias": {2: math.log(5 / 3), 9: 50.0}},
            {1: 0.5 / 1.2, 2: 0.5 / 1.2, 3: 0.15 / 1.2, 4: 0.05 / 1.2},
        ),
        ({"logit_bias": {1: -1e6}}, shares(2, 3, 4)),
        ({"logit_bias": {2: math.log(4)}, "temperature": 0.0}, {2: 1.0}),
    ],
)
def test_support_and_sampled_probabilities_are_exact(sampler, fields, expected) -> None:
    assert support(sampler, **fields) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.9}])
def test_frequencies_are_the_sampled_probabilities(sampler, fields) -> None:
    num = 4000
    request = Request(prompt=(0,), max_tokens=1, n=num, log_probs=True, seed=3, **fields)
    tokens = [completion.tokens[0] for completion in completions(run(sampler, request)[0])]
    probabilities = {token.id: math.exp(token.sampled_log_prob) for token in tokens}
    counts = Counter(token.id for token in tokens)
    assert sum(probabilities.values()) == pytest.approx(1)
    for token_id, p in probabilities.items():
        sigma = math.sqrt(num * p * (1 - p))
        assert abs(counts[token_id] - num * p) <= 4 * sigma


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
def test_log_probs_are_the_raw_models_at_any_temperature(sampler, temperature: float) -> None:
    fields = {"max_tokens": 5, "log_probs": True, "num_top_log_probs": 2, "top_k": 2}
    completion = one(sampler, temperature=temperature, **fields)
    last = 0
    for token in completion.tokens:
        raw = CHAIN[last]
        assert token.log_prob == pytest.approx(math.log(raw[token.id]), abs=1e-12)
        likeliest = sorted((i for i in raw if raw[i]), key=lambda i: (-raw[i], i))[:2]
        assert [alternative.id for alternative in token.top] == likeliest
        assert [math.exp(a.log_prob) for a in token.top] == pytest.approx(
            [raw[i] for i in likeliest]
        )
        last = token.id


def test_forced_tokens_have_log_probs_and_those_behind_are_drawn(sampler) -> None:
    completion = one(sampler, max_tokens=3, forced=(3, 0), top_k=2, log_probs=True)
    forced, sure, drawn = completion.tokens
    assert (forced.id, sure.id) == (3, 0)
    assert forced.log_prob == pytest.approx(math.log(0.15))
    # top_k leaves it out.
    assert forced.sampled_log_prob == -math.inf
    assert sure.log_prob == sure.sampled_log_prob == 0
    assert drawn.id in (1, 2)


def test_forced_token_that_the_model_excludes_has_probability_zero(sampler) -> None:
    [token] = one(sampler, forced=(5,), log_probs=True).tokens
    assert (token.id, token.log_prob, token.sampled_log_prob) == (5, -math.inf, -math.inf)


def test_prompt_is_scored_without_a_sample_token(sampler, tokenizer) -> None:
    fields = {"prompt_log_probs": True, "num_top_log_probs": 1}
    request = Request(prompt=(0, 2, 2, 5), max_tokens=0, **fields)
    happened = run(sampler, request)[0]
    check_events(request, happened, tokenizer)
    [scored] = [event for event in happened if isinstance(event, ScoredPrompt)]
    assert [token.log_prob for token in scored.tokens] == pytest.approx(
        [None, math.log(0.3), math.log(0.6), -math.inf]
    )
    assert [[a.id for a in token.top] for token in scored.tokens] == [[], [1], [2], [2]]


def mixed_requests() -> list[Request]:
    return [
        Request(
            prompt=(0, number % 3),
            max_tokens=4 + number % 5,
            n=1 + number % 3,
            temperature=(0.0, 0.7, 1.3)[number % 3],
            top_p=(1.0, 0.9)[number % 2],
            top_k=(0, 3, 2)[number % 3],
            seed=number % 7,
            stop_ids=frozenset((5,)) if number % 4 == 0 else frozenset(),
            stop_strings=(b"\x01\x00\x01",) if number % 4 == 1 else (),
            forced=(2, 2) if number % 5 == 4 else (),
            log_probs=number % 2 == 0,
        )
        for number in range(24)
    ]


def test_draws_do_not_depend_on_neighbours(tokenizer) -> None:
    requests = mixed_requests()

    def new() -> ScriptedSampler:
        return ScriptedSampler(chain, tokenizer)

    def outcome(happened):
        return [(c.sample, c.tokens, c.finish_reason, c.matched) for c in completions(happened)]

    alone = [outcome(run(new(), request)[0]) for request in requests]
    together = run(new(), *requests)
    shuffled = run(new(), *requests[::-1])
    for number, request in enumerate(requests):
        check_events(request, together[number], tokenizer)
        assert outcome(together[number]) == alone[number]
        assert outcome(shuffled[len(requests) - 1 - number]) == alone[number]

    sampler, cancelled = new(), range(0, 24, 3)
    ids = [sampler.submit(request) for request in requests]
    happened = [*sampler.step(), *sampler.step()]
    for number in cancelled:
        sampler.cancel(ids[number])
    while new_events := sampler.step():
        happened += new_events
    for number, request in enumerate(requests):
        own = [event for event in happened if event.request_id == ids[number]]
        check_events(request, own, tokenizer)
        if number not in cancelled:
            assert outcome(own) == alone[number]


def test_cancelled_sample_keeps_its_tokens_and_ends_once(sampler, tokenizer) -> None:
    request = Request(prompt=(0,), max_tokens=9, n=2)
    request_id = sampler.submit(request)
    happened = [*sampler.step(), *sampler.step()]
    sampler.cancel(request_id)
    sampler.cancel(request_id)
    sampler.cancel(77)
    happened += sampler.step()
    check_events(request, happened, tokenizer)
    assert {c.finish_reason for c in completions(happened)} == {FinishReason.CANCELLED}
    assert [len(ids) for ids in drawn_ids(happened)] == [2, 2]
    assert not sampler.step()


def test_seed_gives_the_same_samples_again_and_they_differ(tokenizer) -> None:
    request = Request(prompt=(0,), max_tokens=6, n=8, seed=5)
    first, again = (run(ScriptedSampler(chain, tokenizer), request)[0] for _ in range(2))
    other = Request(prompt=(0,), max_tokens=6, n=8, seed=6)
    assert drawn_ids(first) == drawn_ids(again)
    assert len({tuple(ids) for ids in drawn_ids(first)}) > 1
    assert drawn_ids(first) != drawn_ids(run(ScriptedSampler(chain, tokenizer), other)[0])


def test_draws_of_successive_positions_are_independent(tokenizer) -> None:
    sampler = ScriptedSampler(lambda ids: {1: 0.5, 2: 0.5}, tokenizer)
    ids = [token.id for token in one(sampler, max_tokens=400).tokens]
    repeats = sum(a == b for a, b in pairwise(ids))
    assert abs(repeats - 399 / 2) <= 4 * math.sqrt(399 / 4)


def test_only_the_first_token_is_forbidden(tokenizer) -> None:
    sampler = ScriptedSampler(lambda ids: {1: 0.9, 2: 0.1}, tokenizer)
    completion = one(sampler, max_tokens=2, temperature=0.0, forbidden_first=frozenset((1,)))
    assert [token.id for token in completion.tokens] == [2, 1]


@given(st.integers(0, 50), st.integers(1, 8), st.sampled_from([b"\0", b"\1\0", b"\2\2\0", b"\7"]))
def test_events_keep_the_law(sampler, tokenizer, seed: int, max_tokens: int, stop: bytes) -> None:
    request = Request(
        prompt=(0,),
        max_tokens=max_tokens,
        n=2,
        seed=seed,
        stop_strings=(stop, b"\5\5"),
        stop_ids=frozenset((3,)),
        forbidden_first=frozenset((1,)),
    )
    check_events(request, run(sampler, request)[0], tokenizer)


def test_each_end_id_alone_ends_a_text(tokenizer) -> None:
    ends = end_ids(tokenizer)
    assert len(ends) == 2
    for end in ends:
        sampler = ScriptedSampler(AnswerTable({(0,): {(65, 66): 1.0}}, end), tokenizer)
        completion = one(sampler, max_tokens=9, stop_ids=ends)
        assert [token.id for token in completion.tokens] == [65, 66, end]
        assert (completion.finish_reason, completion.matched) == (FinishReason.STOP, end)


def spelled(tokenizer, *tokens: bytes) -> ScriptedSampler:
    ids = tuple(tokenizer.mergeable_ranks[token] for token in tokens)
    table = AnswerTable({(0,): {ids: 1.0}}, tokenizer.eod_id)
    return ScriptedSampler(table, tokenizer)


EMOJI = "🙂".encode()


def test_stop_string_across_tokens_ends_a_sample_and_is_not_shown(tokenizer) -> None:
    sampler = spelled(
        tokenizer, b" cat sat", EMOJI[:2], EMOJI[2:3], EMOJI[3:], b"ST", b"OP", b"the"
    )
    request = Request(prompt=(0,), max_tokens=9, stop_strings=(b"STOP",))
    [completion] = completions(run(sampler, request)[0])
    assert len(completion.tokens) == 6
    assert (completion.finish_reason, completion.matched) == (FinishReason.STOP, b"STOP")
    assert completion_text(tokenizer, request, completion) == " cat sat🙂"


def test_character_cut_by_length_is_one_replacement_at_the_end(tokenizer) -> None:
    sampler = spelled(tokenizer, b" cat sat", EMOJI[:2], EMOJI[2:3], EMOJI[3:])
    completion = one(sampler, max_tokens=3)
    assert completion.finish_reason is FinishReason.LENGTH
    pieces = list(text_pieces(tokenizer, (token.id for token in completion.tokens)))
    assert pieces == [" cat sat", "", "", "\ufffd"]


def test_stop_with_the_last_allowed_token_is_a_stop(tokenizer) -> None:
    completion = one(spelled(tokenizer, b"ST", b"OP"), max_tokens=2, stop_strings=(b"STOP",))
    assert completion.finish_reason is FinishReason.STOP


def test_table_of_answers_is_their_distribution(tokenizer) -> None:
    end = tokenizer.im_end_id
    table = AnswerTable({(0,): {(7, 8): 2.0, (7, 9): 1.0, (): 1.0}, (1, 1): {(6,): 1.0}}, end)
    assert table((0,)) == pytest.approx({7: 0.75, end: 0.25})
    assert table((0, 7)) == pytest.approx({8: 2 / 3, 9: 1 / 3})
    assert table((0, 7, 9)) == {end: 1.0}
    assert table((1, 1)) == {6: 1.0}
    assert table((0, 9)) == table((0, end)) == table((1,)) == table((0, 7, 9, end)) == {}


def test_table_with_an_ambiguous_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt \(0, 7\) of .* begins with prompt \(0,\)"):
        AnswerTable({(0, 7): {}, (0,): {}, (1,): {}}, 5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, r"no entry for ids \[0\]"),
        ({1: 0.5, 2: 0.4}, "add up to 0.9"),
        ({1: 1.5, 2: -0.5}, "or one is negative"),
        ({1: math.nan}, "add up to nan"),
        ({1 << 20: 1.0}, "token ids 1048576 to 1048576"),
        ({7: 1.0}, "only has forbidden first tokens"),
    ],
)
def test_script_that_fails_ends_its_own_request_only(tokenizer, said, message: str) -> None:
    sampler = ScriptedSampler(lambda ids: said if ids[0] == 0 else {3: 1.0}, tokenizer)
    good = sampler.submit(Request(prompt=(1,), max_tokens=2))
    bad = sampler.submit(Request(prompt=(0,), max_tokens=2, forbidden_first=frozenset((7,))))
    with pytest.raises(SamplerError, match=message) as caught:
        sampler.step()
    assert caught.value.request_id == bad
    happened = [*sampler.step(), *sampler.step()]
    assert {event.request_id for event in happened} == {good}
    assert drawn_ids(happened) == [[3, 3]]


def test_impossible_request_is_refused_and_not_queued(sampler) -> None:
    with pytest.raises(ConfigError, match="exceed the model's 64"):
        sampler.submit(Request(prompt=(0,), max_tokens=64))
    with pytest.raises(ConfigError, match="n=0; expected at least 1"):
        sampler.submit(Request(prompt=(0,), max_tokens=1, n=0))
    assert not sampler.step()


def test_cancelled_before_it_began_nothing_is_scored(sampler) -> None:
    request = Request(prompt=(0, 1), max_tokens=1, prompt_log_probs=True)
    sampler.cancel(sampler.submit(request))
    [completion] = sampler.step()
    assert (completion.tokens, completion.finish_reason) == ((), FinishReason.CANCELLED)


def test_closed_sampler_has_nothing_left(sampler) -> None:
    sampler.submit(Request(prompt=(0,), max_tokens=9))
    sampler.close()
    assert not sampler.step()
