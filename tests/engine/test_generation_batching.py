"""Continuous batching: what a request gets does not depend on its neighbours or on the layout."""

import math
import random
from dataclasses import dataclass, replace
from functools import partial

import pytest

from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import StepLimits
from phi4.engine.generation.steps import Step
from phi4.errors import ConfigError
from tests.support.engines import engine_on, tiny_recipe
from tests.support.generation import Asked, collect, finished, steps_of
from tests.support.ranks import pool_fixture, run_ranks

LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.pipeline=2",),
    "tp2xpp2": ("parallel.tensor=2", "parallel.pipeline=2"),
}
BLOCK_TOKENS = 4
LIMITS = StepLimits(tokens=24, scored_tokens=7)


@dataclass(frozen=True)
class Case:
    """What surrounds the 24 requests.

    Attributes:
        shuffled: they are submitted in another order.
        num_cancelled: neighbours that are submitted before them and cancelled one by one.
        num_rounds: so many times they are submitted, each after the last has finished.
        num_blocks: of the cache.
        exact: whether the generator is batch_invariant.
    """

    shuffled: bool = False
    num_cancelled: int = 0
    num_rounds: int = 1
    num_blocks: int = 60
    exact: bool = False


TOO_FEW_BLOCKS = {
    "together": Case(),
    "shuffled": Case(shuffled=True),
    "with cancelled neighbours": Case(num_cancelled=8),
}
AGAIN = Case(num_rounds=2, num_blocks=400)
"""Every prefix of the first round is still known in the second."""


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


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def alone(pool) -> list[dict]:
    """Every request by itself, each with an empty cache."""
    return pool.run(run_alone, (), mixed_requests(), False)[0]


@pytest.mark.parametrize("case", TOO_FEW_BLOCKS)
def test_tokens_do_not_depend_on_the_batch(pool, alone, case):
    (found,), stats = pool.run(run_together, (), mixed_requests(), TOO_FEW_BLOCKS[case])[0]

    check_same(found, alone)
    assert stats.waited
    assert stats.largest_step == LIMITS


def test_tokens_do_not_depend_on_known_prefixes(pool, alone):
    (found, again), stats = pool.run(run_together, (), mixed_requests(), AGAIN)[0]

    check_same(found, alone)
    check_same(again, alone)
    computed = 0
    for request, one in zip(mixed_requests(), alone, strict=True):
        length = len(request.prompt)
        # The last prompt token is always computed, and all of them where they are scored.
        known = 0 if request.prompt_log_probs else (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        computed += length - known + sum(len(tokens) - 1 for tokens in one["tokens"])
    assert stats.computed_tokens[1] == computed < stats.computed_tokens[0]


@pytest.mark.parametrize("layout", ["tp2", "pp2", pytest.param("tp2xpp2", marks=pytest.mark.slow)])
def test_tokens_do_not_depend_on_the_layout(pool, alone, layout):
    run = partial(run_ranks, 4) if layout == "tp2xpp2" else pool.run
    disturbed = Case(shuffled=True, num_cancelled=8)
    outcomes = run(run_together, LAYOUTS[layout], mixed_requests(), disturbed)

    (found,), stats = outcomes[0]
    check_same(found, alone)
    assert stats.waited
    assert stats.most_under_way == (2 if "pp2" in layout else 1)
    assert set(outcomes[1:]) == {"followed"}


@pytest.mark.parametrize(
    "layout", ["one process", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS)]
)
def test_no_bit_depends_on_the_batch_or_on_known_prefixes(pool, layout):
    run = partial(run_ranks, 4) if layout == "tp2xpp2" else pool.run
    overrides, requests = LAYOUTS.get(layout, ()), mixed_requests()
    alone = run(run_alone, overrides, requests, True)[0]
    case = replace(AGAIN, shuffled=True, num_cancelled=8, exact=True)
    rounds, _ = run(run_together, overrides, requests, case)[0]

    for found in rounds:
        check_same(found, alone, tolerance=0.0)
    if layout == "pp2":
        # Stages change no sum; tensor ranks do.
        check_same(alone, pool.run(run_alone, (), requests, True)[0], tolerance=0.0)


def check_same(found: list[dict], alone: list[dict], tolerance: float = 1e-5) -> None:
    """The same tokens and ends, and log-probabilities within the tolerance."""
    for one, other in zip(found, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["ends"] == other["ends"]
        for name in ("log_probs", "sampled", "prompt"):
            assert one[name] == pytest.approx(other[name], rel=0, abs=tolerance)


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


WRONG = {
    "prompt": ({"prompt": ()}, "the prompt has no token"),
    "id": ({"prompt": (5, 96)}, "prompt contains the token id 96; expected 0 to 95"),
    "negative id": ({"prompt": (-1,)}, "prompt contains the token id -1"),
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
    "forced": ({"forced": (96,)}, "forced contains the token id 96"),
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


@dataclass(frozen=True)
class Stats:
    """How a generator went about it.

    Attributes:
        waited: whether a request waited for blocks after a step.
        largest_step: the most tokens, and scored tokens, of a step.
        computed_tokens: by round.
        most_under_way: steps that had been begun and not ended, at the most.
    """

    waited: bool
    largest_step: StepLimits
    computed_tokens: tuple[int, ...]
    most_under_way: int


def generator_of(engine, num_blocks: int = 60, exact: bool = False) -> Generator:
    size = CacheSize(num_blocks, BLOCK_TOKENS)
    return Generator(engine, size, "weights", limits=LIMITS, batch_invariant=exact)


def run_alone(
    rank: int, world_size: int, layout: tuple[str, ...], requests: list[Asked], exact: bool
):
    with engine_on(rank, tiny_recipe("model.num_layers=4", *layout), trains=False) as engine:
        if engine is None:
            return None
        found = []
        for request in requests:
            with generator_of(engine, exact=exact) as generator:
                if generator.leads:
                    generator.submit(request)
                    found += collect(finished(generator), 1)
        return found


def run_together(
    rank: int, world_size: int, layout: tuple[str, ...], requests: list[Asked], case: Case
):
    """What the requests get in every round of the case."""
    with engine_on(rank, tiny_recipe("model.num_layers=4", *layout), trains=False) as engine:
        if engine is None:
            return None
        with generator_of(engine, case.num_blocks, case.exact) as generator:
            if not generator.leads:
                generator.follow()
                return "followed"
            order = list(range(len(requests)))
            if case.shuffled:
                random.Random(1).shuffle(order)
            begin, steps, under_way = generator._decoder.begin, [], []

            def recorded(step: Step):
                steps.append(step)
                under_way.append(len(generator._running) + 1)
                return begin(step)

            generator._decoder.begin = recorded
            found, computed, waited = [], [], False
            for _ in range(case.num_rounds):
                by_request, has_waited = one_round(generator, requests, order, case.num_cancelled)
                found.append([by_request[i] for i in range(len(requests))])
                waited |= has_waited
                computed.append(sum(map(num_new, steps)) - sum(computed))
                assert generator.pool.num_in_use == 0
            generator.close()
            scored = [sum(len(row.scored) for row in step.rows) for step in steps]
            largest = StepLimits(max(map(num_new, steps)), max(scored))
            return found, Stats(waited, largest, tuple(computed), max(under_way))


def num_new(step: Step) -> int:
    return sum(len(row.tokens) for row in step.rows)


def one_round(
    generator: Generator, requests: list[Asked], order: list[int], num_cancelled: int
) -> tuple[dict[int, dict], bool]:
    """What each request gets, by its index, and whether any waited."""
    # Long enough to be under way still, or to wait, when they are cancelled.
    unending = {"n": 2, "max_tokens": 20, "seed": 77, "forced": (), "stop_ids": frozenset()}
    neighbours = [generator.submit(replace(requests[i], **unending)) for i in order[:num_cancelled]]
    ids = {i: generator.submit(requests[i]) for i in order}
    events, waited = [], False
    for neighbour in neighbours:
        events += generator.step()
        generator.cancel(neighbour)
    for found in steps_of(generator):
        events += found
        waited |= bool(generator._scheduler._waiting)
    got = collect(events, max(ids.values()) + 1)
    cancelled = [got[i] for i in neighbours]
    assert all(one["ends"] == ["cancelled"] * 2 for one in cancelled)
    assert any(one["tokens"] for one in cancelled) or not neighbours
    return {i: got[request_id] for i, request_id in ids.items()}, waited


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
