"""Prefixes are computed and stored once, under one set of weights; nothing of a request stays."""

import random
from pathlib import Path

import pytest

from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.steps import Step
from phi4.engine.model.gpt import initialise
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.generation import Asked, collect, finished
from tests.support.ranks import RankPool

PREFIX = tuple(random.Random(3).randrange(96) for _ in range(42))
SHALLOW = "model.num_layers=2"


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


def test_a_prefix_is_computed_once_and_stored_once(pool):
    computed, in_use, tokens, again = pool.run(run_prefix)[0]

    # 42 tokens of the prompt, then 30 samples of 5 tokens, of which the last is not cached; a
    # second request computes what is behind the 10 full blocks.
    assert computed == [42, *[30] * 4, 2, *[30] * 4]
    assert max(in_use) == 10 + 30 * 2
    assert again == tokens


def test_after_a_reload_tokens_are_those_of_a_fresh_engine(pool):
    before, after, fresh = pool.run(run_reload)[0]

    assert after == fresh != before


def test_many_requests_leave_no_block_and_no_memory_behind(pool):
    in_use, ends, early_bytes, late_bytes = pool.run(run_many, 1000)[0]

    assert (in_use, ends) == (0, 1000)
    assert late_bytes < 1.05 * early_bytes


def test_one_sample_of_several_can_be_cancelled(pool):
    found, whole = pool.run(run_cancelled_sample)[0]

    assert found["ends"] == ["length", "cancelled", "length"]
    assert found["tokens"] == [whole[0], whole[1][:2], whole[2]]


TRAINED = {
    "pp2-vpp2": ("pipeline=2", "virtual_pipeline=2", "overlap_p2p=true"),
    "tp2+sp": ("tensor=2", "sequence=true"),
    "cp2": ("context=2",),
    "dp2, gathers parameters late": (
        "data=2",
        "distributed_optimizer=true",
        "overlap_grad_reduce=true",
        "overlap_param_gather=true",
    ),
}


@pytest.mark.parametrize(
    "layout",
    [
        "pp2-vpp2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(TRAINED)[1:]),
    ],
)
def test_generating_between_steps_leaves_training_bitwise_unchanged(pool, layout):
    losses = {
        generates: pool.run(run_training, TRAINED[layout], generates)[0]
        for generates in (False, True)
    }

    assert losses[True] == losses[False]


# What follows runs in the ranks.


def run_prefix(rank: int, world_size: int):
    with engine_on(rank, tiny_recipe(SHALLOW), trains=False) as engine:
        if engine is None:
            return None
        with Generator(engine, CacheSize(100, 4), "weights") as generator:
            computed, in_use, begin = [], [], generator._decoder.begin

            def counted(step: Step):
                computed.append(sum(len(row.tokens) for row in step.rows))
                in_use.append(generator.pool.num_in_use)
                return begin(step)

            generator._decoder.begin = counted
            found = []
            for _ in range(2):
                generator.submit(Asked(PREFIX, n=30, max_tokens=5))
                found.append(finished(generator))
            first, second = (collect(events, 2) for events in found)
            return computed, in_use, first[0]["tokens"], second[1]["tokens"]


def run_reload(rank: int, world_size: int):
    recipe, request = tiny_recipe(SHALLOW), Asked(PREFIX, n=2, max_tokens=8)
    found = []
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is None:
            return None
        with Generator(engine, CacheSize(60, 4), 0) as generator:
            for index in range(2):
                generator.submit(request)
                found.append(collect(finished(generator), index + 1)[index]["tokens"])
                initialise(engine.bare_chunks, recipe.model, 99, engine.layout)
                # Even under the key of the old ones.
                generator.reload(0)
        with Generator(engine, CacheSize(60, 4), 0) as generator:
            generator.submit(request)
            return *found, collect(finished(generator), 1)[0]["tokens"]


def run_cancelled_sample(rank: int, world_size: int):
    with engine_on(rank, tiny_recipe(SHALLOW), trains=False) as engine:
        if engine is None:
            return None
        with Generator(engine, CacheSize(60, 4), "weights") as generator:
            request = Asked(PREFIX, n=3, max_tokens=6)
            generator.submit(request)
            events = [*generator.step(), *generator.step()]
            generator.cancel(0, sample=1)
            events += finished(generator)
            generator.submit(request)
            return collect(events, 1)[0], collect(finished(generator), 2)[1]["tokens"]


def run_many(rank: int, world_size: int, count: int):
    """Requests of random lengths, 64 under way at once, every second one cancelled."""
    with engine_on(rank, tiny_recipe("model.num_layers=1"), trains=False) as engine:
        if engine is None:
            return None
        draws, events, sizes = random.Random(0), [], []
        with Generator(engine, CacheSize(200, 4), "weights") as generator:
            live: set[int] = set()
            submitted = 0
            while submitted < count or not generator.is_idle:
                while len(live) < 64 and submitted < count:
                    prompt = [draws.randrange(96) for _ in range(draws.randrange(1, 30))]
                    live.add(generator.submit(Asked(prompt, max_tokens=draws.randrange(1, 20))))
                    submitted += 1
                for i in list(live):
                    if i % 2 and draws.random() < 0.3:
                        generator.cancel(i)
                ended = [one.request_id for one in generator.step() if hasattr(one, "reason")]
                events += ended
                live.difference_update(ended)
                sizes.append(resident_bytes())
            early = sizes[len(sizes) // 4]
            return generator.pool.num_in_use, len(events), early, sizes[-1]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run_training(rank: int, world_size: int, layout: tuple[str, ...], generates: bool):
    recipe = tiny_recipe("model.num_layers=4", *(f"parallel.{key}" for key in layout))
    with engine_on(rank, recipe) as engine:
        if engine is None:
            return None
        losses = []
        for step in range(3):
            batches = batches_of(engine, step)
            losses.append(engine.train_step(batches, NextToken(), learning_rate=1e-2))
            if generates:
                with Generator(engine, CacheSize(40, 4), step) as generator:
                    request = Asked(PREFIX[: 5 + step], n=3)
                    if generator.leads:
                        generator.submit(request)
                        events = finished(generator)
                        generator.close()
                        assert len(events) == 3 * (request.max_tokens + 1)
                    else:
                        generator.follow()
        return losses
