"""Continuous batching: what a request gets does not depend on its neighbours or on the layout."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import StepLimits
from phi4.engine.generation.steps import Step
from phi4.errors import ConfigError
from tests.support.engines import engine_on, tiny_recipe
from tests.support.generation import Asked, collect, finished
from tests.support.markov import VOCAB_SIZE, make_markov, markov_recipe, table
from tests.support.ranks import RankPool

LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.pipeline=2",),
}
LIMITS = StepLimits(tokens=24, scored_tokens=7)


def mixed_requests() -> list[Asked]:
    """24 of all kinds; several share a prefix."""
    draws = random.Random(0)
    prefix = [draws.randrange(96) for _ in range(20)]
    requests = []
    for i in range(24):
        own = [draws.randrange(96) for _ in range(draws.randrange(1, 20))]
        requests.append(
            Asked(
                prompt=(prefix if i % 3 == 0 else []) + own,
                n=draws.choice((1, 1, 2, 3)),
                max_tokens=draws.randrange(1, 9),
                temperature=draws.choice((0.0, 0.7, 1.0, 1.5)),
                top_p=draws.choice((1.0, 0.9)),
                top_k=draws.choice((0, 20)),
                min_p=draws.choice((0.0, 0.02)),
                seed=i,
                forced=(3, 4) if i % 7 == 1 else (),
                stop_ids=frozenset(range(0, 96, 12)),
                num_top_log_probs=i % 4,
                prompt_log_probs=i % 5 == 0,
            )
        )
    return requests


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone(pool) -> list[dict]:
    """Every request by itself, each with an empty cache."""
    return pool.run(run_alone, mixed_requests())[0]


@pytest.mark.parametrize("disturbed", [False, True])
def test_tokens_do_not_depend_on_the_batch(pool, alone, disturbed):
    found, stats = pool.run(run_together, (), mixed_requests(), disturbed)[0]

    check_same(found, alone)
    assert stats == {"in use": 0, "waited": True, "missing": 0, "most": LIMITS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_do_not_depend_on_the_layout(pool, alone, layout):
    outcomes = pool.run(run_together, LAYOUTS[layout], mixed_requests(), True)

    check_same(outcomes[0][0], alone)
    assert outcomes[1] == "followed"


def check_same(found: list[dict], alone: list[dict]) -> None:
    for one, other in zip(found, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["ends"] == other["ends"]
        for name in ("log_probs", "sampled", "prompt"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_requests_do_what_they_ask(alone):
    for request, one in zip(mixed_requests(), alone, strict=True):
        assert len(one["tokens"]) == len(one["ends"]) == request.n
        for tokens, reason in zip(one["tokens"], one["ends"], strict=True):
            stopped = [i for i, token in enumerate(tokens) if token in request.stop_ids]
            assert stopped == ([len(tokens) - 1] if reason == "stop" else [])
            assert reason == "stop" or len(tokens) == request.max_tokens
            assert (
                tuple(tokens[:2]) == tuple(request.forced[: len(tokens)])[:2] or not request.forced
            )
        assert len(one["prompt"]) == (len(request.prompt) - 1) * request.prompt_log_probs


@pytest.mark.parametrize(
    "layout",
    ["one process", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS)],
)
def test_a_model_of_known_probabilities_is_drawn_and_scored_as_it_is(pool, layout):
    log_probs_VV, prompt = table(), [3, 9, 9, 30, 1, 17]
    request = Asked(prompt, n=200, max_tokens=20, seed=5, prompt_log_probs=True)
    warm = replace(request, n=20, temperature=0.6, seed=6, forbidden_first=frozenset({4}))
    found = pool.run(run_markov, LAYOUTS.get(layout, ()), log_probs_VV, [request, warm])[0]

    pairs = list(pairwise(prompt))
    expected = [float(log_probs_VV[a, b]) for a, b in pairs]
    assert found[0]["prompt"] == pytest.approx(expected, abs=1e-5)
    for one, temperature in zip(found, (1.0, 0.6), strict=True):
        tempered_VV = (log_probs_VV / temperature).log_softmax(-1)
        texts = [[prompt[-1], *tokens] for tokens in one["tokens"]]
        pairs = [pair for text in texts for pair in pairwise(text)]
        expected = [float(log_probs_VV[a, b]) for a, b in pairs]
        assert one["log_probs"] == pytest.approx(expected, abs=1e-5)
        later = [i for i in range(len(pairs)) if i % 20]
        expected = [float(tempered_VV[pairs[i]]) for i in later]
        assert [one["sampled"][i] for i in later] == pytest.approx(expected, abs=1e-5)
    assert 4 not in {tokens[0] for tokens in found[1]["tokens"]}
    later = [pair for tokens in found[0]["tokens"] for pair in pairwise(tokens)]
    check_frequencies(later, log_probs_VV)


def check_frequencies(pairs: Sequence[tuple[int, int]], log_probs_VV: torch.Tensor) -> None:
    """Next tokens over all draws, each with its own expectation and variance."""
    probabilities_NV = log_probs_VV.exp()[[a for a, _ in pairs]]
    expected_V = probabilities_NV.sum(0)
    sigma_V = (probabilities_NV * (1 - probabilities_NV)).sum(0).sqrt()
    counts_V = torch.bincount(torch.tensor([b for _, b in pairs]), minlength=VOCAB_SIZE)
    assert len(pairs) == 3800
    assert bool(((counts_V - expected_V).abs() <= 4 * sigma_V).all())


WRONG = {
    "prompt": ({"prompt": ()}, "the prompt has no token"),
    "id": ({"prompt": (5, 96)}, "prompt has the token id 96; expected 0 to 95"),
    "negative id": ({"prompt": (-1,)}, "prompt has the token id -1"),
    "nan": ({"temperature": math.nan}, "temperature=nan; expected 0, or 1e-06 and more"),
    "tiny": ({"temperature": 1e-320}, "temperature=1e-320"),
    "n": ({"n": 0}, "n=0; expected at least 1"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0; expected above 0 and at most 1"),
    "nan top_p": ({"top_p": math.nan}, "top_p=nan"),
    "top_k": ({"top_k": -1}, "top_k=-1"),
    "min_p": ({"min_p": 1.5}, "min_p=1.5"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens=0; expected at least 1"),
    "length": ({"prompt": [1] * 60}, "a prompt of 60 tokens and 5 new ones exceed the model's 64"),
    "bias": ({"logit_bias": {4: math.inf}}, r"logit_bias[4]=inf"),
    "forced": ({"forced": (96,)}, "forced has the token id 96"),
    "all": ({"forbidden_first": frozenset(range(96))}, "forbidden_first holds all 96 ids"),
    "seed": ({"seed": 2**64}, "expected a number of 64 bits"),
    "top": ({"num_top_log_probs": -1}, "num_top_log_probs=-1"),
    "cache": ({"n": 30}, "30 samples of 1 + 5 tokens need 61 cache blocks"),
}


def test_impossible_requests_are_refused_before_anything_is_queued(pool):
    requests = [replace(Asked([1]), **change) for change, _ in WRONG.values()]
    errors = pool.run(run_refused, requests)[0]

    for error, (_, message) in zip(errors, WRONG.values(), strict=True):
        assert message in error


# What follows runs in the ranks.


def generator_of(engine, num_blocks: int = 60) -> Generator:
    return Generator(engine, CacheSize(num_blocks, 4), "weights", limits=LIMITS)


def run_alone(rank: int, world_size: int, requests: list[Asked]):
    with engine_on(rank, tiny_recipe("model.num_layers=4"), trains=False) as engine:
        if engine is None:
            return None
        found = []
        for request in requests:
            with generator_of(engine) as generator:
                generator.submit(request)
                found += collect(finished(generator), 1)
        return found


def run_together(
    rank: int, world_size: int, layout: tuple[str, ...], requests: list[Asked], disturbed: bool
):
    """All at once in a pool that they do not fit into; disturbed also by ones that are cancelled,
    in another order and with prefixes that are known already."""
    with engine_on(rank, tiny_recipe("model.num_layers=4", *layout), trains=False) as engine:
        if engine is None:
            return None
        with generator_of(engine) as generator:
            if not generator.leads:
                generator.follow()
                return "followed"
            sizes, begin = [], generator._decoder.begin

            def counted(step: Step):
                tokens = sum(len(row.tokens) for row in step.rows)
                sizes.append((tokens, sum(len(row.scored) for row in step.rows)))
                return begin(step)

            generator._decoder.begin = counted
            order, neighbours = list(range(len(requests))), []
            if disturbed:
                random.Random(1).shuffle(order)
                others = [replace(requests[i], n=2, seed=77) for i in order[:8]]
                neighbours = [generator.submit(other) for other in others]
            ids = [generator.submit(requests[i]) for i in order]
            events, waited = [], False
            for neighbour in neighbours:
                events += generator.step()
                generator.cancel(neighbour)
            while not generator.is_idle:
                events += generator.step()
                waited |= bool(generator._scheduler._waiting)
            generator.close()
            found = collect(events, len(neighbours) + len(ids))
            ends = sum(len(one["ends"]) for one in found)
            expected = 2 * len(neighbours) + sum(request.n for request in requests)
            stats = {
                "in use": generator.pool.num_in_use,
                "waited": waited,
                "missing": expected - ends,
                "most": StepLimits(*map(max, zip(*sizes, strict=True))),
            }
            by_request = dict(zip(order, ids, strict=True))
            return [found[by_request[i]] for i in range(len(requests))], stats


def run_markov(rank: int, world_size: int, layout, log_probs_VV, requests: list[Asked]):
    with engine_on(rank, markov_recipe(*layout), trains=False) as engine:
        if engine is None:
            return None
        make_markov(engine, log_probs_VV)
        size, limits = CacheSize(1400, 4), StepLimits(256, 4)
        with Generator(engine, size, "weights", limits=limits) as generator:
            if not generator.leads:
                generator.follow()
                return None
            for request in requests:
                generator.submit(request)
            found = collect(finished(generator), len(requests))
            generator.close()
            return found


def run_refused(rank: int, world_size: int, requests: list[Asked]):
    with engine_on(rank, tiny_recipe("model.num_layers=4"), trains=False) as engine:
        if engine is None:
            return None
        errors = []
        with generator_of(engine) as generator:
            for request in requests:
                try:
                    generator.submit(request)
                except ConfigError as error:
                    errors.append(str(error))
            assert generator.is_idle
        return errors
