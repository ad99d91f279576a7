"""A model of known probabilities is drawn from and scored as it is, through the whole engine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from phi4.engine.generation.draws import Draw
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import StepLimits
from tests.support.draw_reference import kept_probabilities
from tests.support.engines import engine_on
from tests.support.generation import Asked, collect, generate
from tests.support.markov import VOCAB_SIZE, make_markov, markov_recipe, table
from tests.support.ranks import pool_fixture

LAYOUTS = {
    "one process": (),
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.pipeline=2",),
}
PROMPT = [3, 9, 9, 30, 1, 22, 8, 17]
"""Whole blocks: samples of one token need none of their own."""
NUM_DRAWS = 4000
BIAS = {5: 2.5, 20: -3.0}
ALL_AT_ONCE = Asked(
    PROMPT, temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, logit_bias=BIAS, num_top_log_probs=3
)
DISTRIBUTIONS = {
    "raw": Asked(PROMPT),
    "temperature": Asked(PROMPT, temperature=0.6),
    "top_k": Asked(PROMPT, top_k=6),
    "top_p": Asked(PROMPT, top_p=0.8),
    "min_p": Asked(PROMPT, min_p=0.04),
    "bias": Asked(PROMPT, logit_bias=BIAS),
    "forbidden": Asked(PROMPT, forbidden_first=frozenset({4, 19})),
    "all at once": replace(ALL_AT_ONCE, forbidden_first=frozenset({19})),
}
TRUNCATED = {"top_k", "top_p", "min_p", "all at once"}


pool = pool_fixture(2)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if parallel else ())
        for name, parallel in LAYOUTS.items()
    ]
)
def layout(request) -> tuple[str, ...]:
    return LAYOUTS[request.param]


def test_draws_have_exactly_the_support_and_its_frequencies(pool, layout):
    log_probs_VV = table()
    requests = [
        replace(request, n=NUM_DRAWS, max_tokens=1, seed=seed)
        for seed, request in enumerate(DISTRIBUTIONS.values())
    ]
    found = pool.run(run_markov, layout, log_probs_VV, requests)[0]

    log_probs = log_probs_VV[PROMPT[-1]].tolist()
    for name, request, one in zip(DISTRIBUTIONS, requests, found, strict=True):
        kept = kept_probabilities(log_probs, draw_of(request, is_first=True))
        assert (len(kept) < VOCAB_SIZE - len(request.forbidden_first)) == (name in TRUNCATED)
        tokens = [token for (token,) in one["tokens"]]
        check_counts(tokens, [PROMPT[-1]] * NUM_DRAWS, {PROMPT[-1]: kept})
        check_close(one["log_probs"], [log_probs[token] for token in tokens])
        check_close(one["sampled"], [math.log(kept[token]) for token in tokens])


def test_every_token_of_a_text_is_drawn_and_scored_by_the_one_before(pool, layout):
    log_probs_VV = table()
    raw = Asked(PROMPT, n=200, max_tokens=20, seed=5, prompt_log_probs=True)
    requests = [raw, replace(ALL_AT_ONCE, n=40, max_tokens=20, seed=6)]
    found = pool.run(run_markov, layout, log_probs_VV, requests)[0]

    rows = log_probs_VV.tolist()
    check_close(found[0]["prompt"], [rows[a][b] for a, b in pairwise(PROMPT)])
    for request, one in zip(requests, found, strict=True):
        kept = {a: kept_probabilities(row, draw_of(request)) for a, row in enumerate(rows)}
        texts = [[PROMPT[-1], *tokens] for tokens in one["tokens"]]
        pairs = [pair for text in texts for pair in pairwise(text)]
        assert len(pairs) == request.n * 20
        check_counts([b for _, b in pairs], [a for a, _ in pairs], kept)
        check_close(one["log_probs"], [rows[a][b] for a, b in pairs])
        check_close(one["sampled"], [math.log(kept[a][b]) for a, b in pairs])
        for (last, _), top in zip(pairs, one["tops"], strict=True):
            values, ids = log_probs_VV[last].topk(request.num_top_log_probs)
            assert [token for token, _ in top] == ids.tolist()
            check_close([value for _, value in top], values.tolist())


def draw_of(request: Asked, is_first: bool = False) -> Draw:
    """The distribution that a request asks for."""
    return Draw(
        seed=request.seed,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        logit_bias=request.logit_bias,
        forbidden=request.forbidden_first if is_first else frozenset(),
    )


def check_counts(
    tokens: Sequence[int], contexts: Sequence[int], kept: Mapping[int, dict[int, float]]
) -> None:
    """Independent draws, each from the {id: probability} kept after its context.

    No token is outside of its support, and counts are within 4 sigma.
    """
    assert all(token in kept[context] for token, context in zip(tokens, contexts, strict=True))
    probabilities_VV = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    for context, one in kept.items():
        ids = list(one)
        probabilities_VV[context, ids] = torch.tensor([one[i] for i in ids], dtype=torch.float64)
    probabilities_NV = probabilities_VV[contexts]
    expected_V = probabilities_NV.sum(0)
    sigma_V = (probabilities_NV * (1 - probabilities_NV)).sum(0).sqrt()
    counts_V = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE)
    assert bool(((counts_V - expected_V).abs() <= 4 * sigma_V).all())
    # With fewer expected draws, none at all is within 4 sigma.
    assert bool((counts_V > 0)[expected_V > 16].all())


def check_close(found: Sequence[float], expected: Sequence[float]) -> None:
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    assert max(differences, default=0.0) <= 1e-5


# What follows runs in the ranks.


def run_markov(
    rank: int,
    world_size: int,
    layout: tuple[str, ...],
    log_probs_VV: torch.Tensor,
    requests: list[Asked],
):
    with engine_on(rank, markov_recipe(*layout), trains=False) as engine:
        if engine is None:
            return None
        make_markov(engine, log_probs_VV)
        size, limits = CacheSize(2000, 4), StepLimits(256, 4)
        with Generator(engine, size, "weights", limits=limits) as generator:
            steps = generate(generator, requests)
        return collect([event for events in steps for event in events], len(requests))
