"""Prefixes are computed and stored once, under one set of weights; nothing of a request stays."""

import gc
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from phi4.engine.generation.blocks import CachedSequence
from phi4.engine.generation.events import SampleEnded
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.steps import Step
from phi4.engine.model.gpt import initialise
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.generation import Asked, collect, finished
from tests.support.ranks import pool_fixture

PREFIX = tuple(random.Random(3).randrange(96) for _ in range(42))
SHALLOW = "model.num_layers=2"


pool = pool_fixture(2)


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


ROOM_FOR_64 = 64 * 12
"""Blocks of 64 requests at their longest, 29 + 20 tokens."""


@pytest.mark.parametrize("num_blocks", [ROOM_FOR_64, 200], ids=["room for all", "full pool"])
def test_many_requests_leave_no_block_and_no_memory_behind(pool, num_blocks):
    found = pool.run(run_many, 1000, num_blocks)[0]

    assert Counter(found.ends.values()) == {"length": 500, "cancelled": 500}
    if num_blocks == ROOM_FOR_64:
        assert (found.most_rows, found.most_waiting) == (64, 0)
    else:
        assert found.most_rows < 64
        assert found.most_waiting > 0
    assert found.late_bytes < 1.05 * found.early_bytes
    assert (found.num_in_use, found.num_sequences) == (0, 0)


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
    undisturbed = pool.run(run_training, TRAINED[layout], False)

    assert pool.run(run_training, TRAINED[layout], True) == undisturbed


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

        def draw_others(place: str) -> None:
            initialise(engine.bare_chunks, recipe.model, 99, engine.layout)

        size = CacheSize(60, 4)
        with Generator(engine, size, "run", load_weights=draw_others) as generator:
            for index in range(2):
                generator.submit(request)
                found.append(collect(finished(generator), index + 1)[index]["tokens"])
                # Even under the key of the old ones.
                generator.load("run")
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


@dataclass(frozen=True)
class Many:
    """How many requests were under way, and what they leave behind.

    Attributes:
        ends: the reason of each request's end.
        most_rows: of a step.
        most_waiting: requests that a step left without blocks.
        early_bytes, late_bytes: resident, after a quarter of the steps and after the last one.
        num_in_use: blocks, at the end.
        num_sequences: objects that are still alive at the end.
    """

    ends: dict[int, str]
    most_rows: int
    most_waiting: int
    early_bytes: int
    late_bytes: int
    num_in_use: int
    num_sequences: int


def run_many(rank: int, world_size: int, count: int, num_blocks: int):
    """Requests of random lengths, 64 at once; every second one is cancelled before its end."""
    with engine_on(rank, tiny_recipe("model.num_layers=1"), trains=False) as engine:
        if engine is None:
            return None
        with Generator(engine, CacheSize(num_blocks, 4), "weights") as generator:
            rows, begin = [], generator._decoder.begin

            def counted(step: Step):
                rows.append(len(step.rows))
                return begin(step)

            generator._decoder.begin = counted
            draws, ends, waiting, sizes = random.Random(0), {}, [], []
            patience: dict[int, int] = {}
            num_live = num_submitted = 0
            while num_live or num_submitted < count:
                for i in range(num_submitted, min(count, num_submitted + 64 - num_live)):
                    prompt = [draws.randrange(96) for _ in range(draws.randrange(1, 30))]
                    ends_early = i % 2 == 1
                    max_tokens = 20 if ends_early else draws.randrange(1, 20)
                    assert generator.submit(Asked(prompt, max_tokens=max_tokens)) == i
                    patience |= {i: draws.randrange(16)} if ends_early else {}
                num_submitted = min(count, num_submitted + 64 - num_live)
                for i in [i for i, left in patience.items() if not left]:
                    generator.cancel(i)
                patience = {i: left - 1 for i, left in patience.items() if left}
                ended = [one for one in generator.step() if isinstance(one, SampleEnded)]
                assert not any(one.request_id in ends for one in ended)
                ends |= {one.request_id: one.reason for one in ended}
                num_live = num_submitted - len(ends)
                waiting.append(len(generator._scheduler._waiting))
                sizes.append(resident_bytes())
                assert len(sizes) < 10 * count, "requests are in progress, and no step ends them"
            gc.collect()
            return Many(
                ends,
                max(rows),
                max(waiting),
                sizes[len(sizes) // 4],
                sizes[-1],
                generator.pool.num_in_use,
                sum(isinstance(one, CachedSequence) for one in gc.get_objects()),
            )


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
