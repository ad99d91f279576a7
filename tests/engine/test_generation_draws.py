"""Draws: exact supports and log-probabilities, frequencies, and independence of the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.engine.generation.draws import Draw, draw, truncated
from phi4.engine.generation.noise import gumbel, random_bits, stream_key
from tests.support.draw_reference import (
    kept_probabilities,
    key_of,
    noise_of,
    reference_draw,
    splitmix64,
)

PROBABILITIES = (0.05, 0.4, 0.1, 0.02, 0.25, 0.1, 0.08)
LOGITS = torch.tensor(PROBABILITIES).log() + 3.0
NUM_DRAWS = 4000
CPU = torch.device("cpu")

SUPPORTS = {
    "all": (Draw(0), {0, 1, 2, 3, 4, 5, 6}),
    "top_k": (Draw(0, top_k=2), {1, 4}),
    "top_k of equals takes the lower id": (Draw(0, top_k=3), {1, 4, 2}),
    "top_k of more than there are": (Draw(0, top_k=99), {0, 1, 2, 3, 4, 5, 6}),
    "top_p": (Draw(0, top_p=0.7), {1, 4, 2}),
    "top_p below the most probable": (Draw(0, top_p=0.01), {1}),
    "top_p at a temperature": (Draw(0, top_p=0.7, temperature=0.5), {1, 4}),
    "top_p of what top_k left": (Draw(0, top_p=0.6, top_k=2), {1}),
    "min_p": (Draw(0, min_p=0.22), {1, 2, 4, 5}),
    "min_p at a temperature": (Draw(0, min_p=0.22, temperature=2.0), {0, 1, 2, 3, 4, 5, 6}),
    "all three": (Draw(0, min_p=0.22, top_p=0.95, top_k=6), {1, 2, 4, 5}),
    "forbidden": (Draw(0, forbidden=frozenset({1, 2}), top_k=2), {4, 5}),
    "bias": (Draw(0, logit_bias={3: 10.0, 1: -50.0}, top_k=2), {3, 4}),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_draws_have_exactly_the_support_and_its_frequencies(name):
    row, support = SUPPORTS[name]
    rows = [row._replace(position=i) for i in range(NUM_DRAWS)]
    drawn = draw(LOGITS.expand(NUM_DRAWS, -1), rows)
    expected = kept_probabilities(LOGITS.double().tolist(), row)

    assert expected.keys() == support
    assert {one.token for one in drawn} <= support
    for token, probability in expected.items():
        found = sum(one.token == token for one in drawn)
        sigma = math.sqrt(NUM_DRAWS * probability * (1 - probability))
        assert abs(found - NUM_DRAWS * probability) <= 4 * sigma


@pytest.mark.parametrize("name", SUPPORTS)
def test_log_probs_are_the_models_and_the_drawn_distributions(name):
    row, _ = SUPPORTS[name]
    (found,) = draw(LOGITS[None], [row])
    kept = kept_probabilities(LOGITS.double().tolist(), row)

    assert found.log_prob == pytest.approx(math.log(PROBABILITIES[found.token]), abs=1e-6)
    assert found.sampled_log_prob == pytest.approx(math.log(kept[found.token]), abs=1e-12)


def test_temperature_zero_takes_the_most_probable_and_the_lower_of_equals():
    greedy = Draw(0, temperature=0.0)
    biased = greedy._replace(logit_bias={6: 20.0})
    rows = [greedy, greedy._replace(forbidden=frozenset({1, 4})), biased]
    drawn = draw(LOGITS.expand(3, -1), rows)

    assert [one.token for one in drawn] == [1, 2, 6]
    assert {one.sampled_log_prob for one in drawn} == {0.0}
    assert draw(torch.zeros(1, 50), [greedy])[0].token == 0


def test_forced_tokens_are_scored_as_if_they_had_been_drawn():
    changes = ({}, {"top_k": 2}, {"temperature": 0.0}, {"temperature": 0.0, "forced": 1})
    drawn = draw(LOGITS.expand(4, -1), [Draw(0, forced=3)._replace(**one) for one in changes])

    assert [one.token for one in drawn] == [3, 3, 3, 1]
    assert drawn[0].log_prob == pytest.approx(math.log(PROBABILITIES[3]), abs=1e-6)
    assert [one.sampled_log_prob for one in drawn[1:]] == [-math.inf, -math.inf, 0.0]
    assert drawn[0].sampled_log_prob == pytest.approx(drawn[0].log_prob, abs=1e-12)


def test_ids_beyond_the_tokenizers_are_not_drawn():
    rows = [Draw(0, temperature=0.0), *(Draw(seed) for seed in range(200))]
    drawn = draw(LOGITS.flip(0).expand(201, -1), rows, num_ids=4)

    assert drawn[0].token == 2
    assert {one.token for one in drawn} == {0, 1, 2, 3}
    kept = sum(PROBABILITIES[3:])
    for one in drawn[1:]:
        difference = one.sampled_log_prob - one.log_prob
        assert difference == pytest.approx(-math.log(kept), abs=1e-6)


def test_top_log_probs_are_ordered_and_equal_ones_ascend():
    drawn = draw(LOGITS.expand(3, -1), [Draw(0, num_top=n) for n in (0, 4, 99)])

    assert [[token for token, _ in one.top] for one in drawn] == [
        [],
        [1, 4, 2, 5],
        [1, 4, 2, 5, 6, 0, 3],
    ]
    for token, log_prob in drawn[1].top:
        assert log_prob == pytest.approx(math.log(PROBABILITIES[token]), abs=1e-6)


def test_low_temperature_does_not_overflow():
    (found,) = draw(torch.tensor([[1.0, 0.0, -1.0]]), [Draw(0, temperature=1e-320)])

    assert (found.token, found.sampled_log_prob) == (0, 0.0)


ROWS = st.builds(
    Draw,
    seed=st.integers(-(2**63), 2**64 - 1),
    sample=st.integers(0, 200),
    position=st.integers(0, 20000),
    temperature=st.sampled_from((0.0, 0.3, 1.0, 2.5)),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from((1.0, 0.37, 0.81)),
    min_p=st.sampled_from((0.0, 0.13)),
    logit_bias=st.dictionaries(st.integers(0, 8), st.floats(-5, 5), max_size=2),
    forbidden=st.frozensets(st.integers(0, 8), max_size=4),
    forced=st.none() | st.none() | st.integers(0, 8),
    num_top=st.integers(0, 4),
)


@settings(max_examples=25)
@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 1000))
def test_batch_equals_the_definition_row_by_row(rows, number):
    generator = torch.Generator().manual_seed(number)
    logits_RV = torch.randn(len(rows), 9, generator=generator, dtype=torch.float64)
    for found, logits_V, row in zip(draw(logits_RV, rows), logits_RV, rows, strict=True):
        expected = reference_draw(logits_V.tolist(), row)
        assert found.token == expected.token
        assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-12)
        assert found.sampled_log_prob == pytest.approx(expected.sampled_log_prob, abs=1e-12)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]


@settings(max_examples=10)
@given(st.lists(ROWS, min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_a_row_has_the_same_bits_in_any_batch(rows, random):
    logits_RV = torch.randn(len(rows), 1003, generator=torch.Generator().manual_seed(len(rows)))
    together = draw(logits_RV, rows)
    order = random.sample(range(len(rows)), len(rows))

    assert [draw(logits_RV[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))] == together
    assert draw(logits_RV[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_truncation_keeps_a_token_even_when_all_are_equal():
    rows = [Draw(0, top_p=1e-9), Draw(0, top_k=1), Draw(0, min_p=1.0)]
    kept = truncated(torch.zeros(3, 5, dtype=torch.float64).log_softmax(-1), rows).isfinite()

    assert kept.tolist() == [[True] + [False] * 4] * 2 + [[True] * 5]


@given(seed=st.integers(-(2**63), 2**64 - 1), sample=st.integers(0, 99))
def test_noise_is_splitmix64_of_the_key(seed, sample):
    row = Draw(seed, sample, 7)
    key = stream_key(seed, sample, 7)
    bits = [value % 2**64 for value in random_bits([0, key], 5, CPU)[1].tolist()]

    assert key % 2**64 == key_of(row)
    assert bits == splitmix64(key_of(row), 5)
    assert gumbel([key], 5, CPU)[0].tolist() == pytest.approx(noise_of(row, 5), abs=1e-12)


def test_noise_differs_between_seeds_samples_and_positions():
    keys = {stream_key(*triple) for triple in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}

    assert len(keys) == 4
    # The known first outputs of SplitMix64 with state 0.
    assert [hex(x % 2**64) for x in random_bits([0], 2, CPU)[0].tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
    ]
    assert stream_key(-1, 0, 0) == stream_key(2**64 - 1, 0, 0)


def test_nan_has_as_many_most_probable_tokens_as_are_asked_for():
    logits_RV = torch.full((2, 8), torch.nan)
    logits_RV[1, 3] = 0.0
    for one in draw(logits_RV, [Draw(0, num_top=5)] * 2):
        assert len(one.top) == 5
        assert all(value != value for _, value in one.top)
