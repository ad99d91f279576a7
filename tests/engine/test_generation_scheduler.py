"""Several steps under way: what a request gets is the same, and every row reads its own tokens."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest

from phi4.engine.generation.blocks import BlockPool, slots_of
from phi4.engine.generation.draws import Drawn
from phi4.engine.generation.scheduler import Scheduler, StepLimits
from phi4.engine.generation.steps import TILE_TOKENS, Step, StepRow, tiles
from tests.support.generation import Asked, collect

SIZE, NUM_BLOCKS, VOCAB_SIZE = 4, 40, 96


class Memory:
    """A cache of tokens in the place of keys, and a model that draws a function of them."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    def run(self, step: Step) -> list[list[Drawn]]:
        for copy in step.copies:
            for i in range(SIZE):
                self.tokens[copy.target * SIZE + i] = self.tokens.get(copy.source * SIZE + i, -1)
        return [self._drawn(row) for row in step.rows]

    def _drawn(self, row: StepRow) -> list[Drawn]:
        slots = slots_of(row.blocks, SIZE, 0, row.end).tolist()
        self.tokens.update(zip(slots[row.start :], row.tokens, strict=True))
        seen = tuple(self.tokens[slot] for slot in slots)
        return [
            Drawn(hash((seen, one.sample, one.position)) % VOCAB_SIZE, -1.0, -1.0, ())
            for one in (*row.scored, *row.draws)
        ]


def requests_of(seed: int) -> list[Asked]:
    draws = random.Random(seed)
    prefix = [draws.randrange(VOCAB_SIZE) for _ in range(14)]
    return [
        Asked(
            prompt=prefix[: draws.randrange(14)] + [draws.randrange(VOCAB_SIZE) for _ in range(3)],
            n=draws.choice((1, 2, 3)),
            max_tokens=draws.randrange(1, 7),
            stop_ids=frozenset(range(0, VOCAB_SIZE, 12)),
            prompt_log_probs=draws.random() < 0.2,
        )
        for _ in range(24)
    ]


def run(
    requests: Sequence[Asked], max_planned: int, cancelled: Sequence[int] = ()
) -> tuple[list[dict], BlockPool, int]:
    """What every request got, and the most steps that were under way."""
    pool, memory = BlockPool(NUM_BLOCKS, SIZE), Memory()
    scheduler = Scheduler(pool, StepLimits(tokens=9, scored_tokens=4), 0, max_planned)
    events, under_way, most = [], deque(), 0
    for i, request in enumerate(requests):
        scheduler.submit(i, request)
    left, coin = deque(cancelled), random.Random(1)
    while not scheduler.is_idle:
        if left and coin.random() < 0.3:
            events += scheduler.cancel(left.popleft())
        step = scheduler.plan()
        if step.rows:
            under_way.append(memory.run(step))
        most = max(most, len(under_way))
        if under_way and (len(under_way) == max_planned or not step.rows):
            events += scheduler.finish(under_way.popleft())
    return collect(events, len(requests)), pool, most


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_planned", [2, 3])
def test_steps_under_way_do_not_change_what_is_drawn(seed, max_planned):
    requests = requests_of(seed)
    expected, *_ = run(requests, 1)
    found, pool, most = run(requests, max_planned)

    assert found == expected
    assert (pool.num_in_use, most) == (0, max_planned)


@pytest.mark.parametrize("seed", range(6))
def test_cancelled_neighbours_do_not_change_what_is_drawn(seed):
    requests = requests_of(seed)
    expected, *_ = run(requests, 1)
    neighbours = [replace(one, n=2, max_tokens=6) for one in requests_of(seed + 50)[:8]]
    mixed = [one for pair in zip(neighbours, requests[:8], strict=True) for one in pair]
    found, pool, _ = run(mixed + requests[8:], 3, cancelled=range(0, 16, 2))

    assert found[1:16:2] + found[16:] == expected
    assert all(len(one["ends"]) == 2 for one in found[0:16:2])
    assert any("cancelled" in one["ends"] for one in found[0:16:2])
    assert pool.num_in_use == 0


def test_a_sample_is_in_one_step_and_steps_share_the_samples():
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, SIZE), StepLimits(), 0, 2)
    memory = Memory()
    scheduler.submit(0, Asked((1, 2, 3), n=5, max_tokens=4))
    scheduler.finish(memory.run(scheduler.plan()))
    first, second = scheduler.plan(), scheduler.plan()

    assert (len(first.rows), len(second.rows)) == (3, 2)
    with pytest.raises(ValueError, match="2 planned steps have not been finished"):
        scheduler.plan()


def test_chunks_of_one_prompt_are_under_way_together():
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, SIZE), StepLimits(tokens=4), 0, 3)
    scheduler.submit(0, Asked(range(10)))
    steps = [scheduler.plan() for _ in range(3)]

    assert [list(step.rows[0].tokens) for step in steps] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert [bool(step.draws) for step in steps] == [False, False, True]


def test_tiles_hold_every_token_once_in_order():
    rows = [StepRow([5], 8, (0, 1, 2), ("a", "b")), StepRow(range(20), 3, range(6), ("c",), "xyz")]
    passes = list(tiles(Step(rows), 99))

    assert [len(one.rows) for one in passes] == [TILE_TOKENS] * 2
    singles = [row for one in passes for row in one.rows]
    assert all(len(row.tokens) == 1 for row in singles)
    assert [(row.tokens[0], row.start) for row in singles[:21]] == [
        (5, 8),
        *((i, 3 + i) for i in range(20)),
    ]
    assert [one for each in passes for one in each.draws] == ["a", "b", "x", "y", "z", "c"]
    assert {tuple(row.blocks) for row in singles[21:]} == {(99,)}
