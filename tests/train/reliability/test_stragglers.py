"""A rank that is slower than its peers: the judgement by numbers, and one real slow rank."""

import random
import socket
from unittest.mock import Mock, patch

import pytest

from phi4.engine.model.gpt import Phi4Model
from phi4.rundir.state import RunState
from phi4.stages.pretrain import NextToken
from phi4.train.reliability.stragglers import Pace, PaceComparison, stragglers
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import run_ranks
from tests.support.waiting import compute


def named(comparison: PaceComparison, *seconds: float, stages: int = 1) -> list[int]:
    paces = [Pace(rank % stages, value) for rank, value in enumerate(seconds)]
    return [straggler.rank for straggler in comparison.of(paces)[1]]


def test_rank_twice_as_slow_is_named_in_the_second_window_and_once() -> None:
    comparison = PaceComparison(1.5)
    windows = [named(comparison, 1.0, 2.0, 1.1, 0.9) for _ in range(4)]
    assert windows == [[], [1], [], []]


def test_slow_window_between_good_ones_names_nobody() -> None:
    comparison = PaceComparison(1.5)
    windows = [named(comparison, 1.0, 9.0 if n % 2 else 1.0, 1.0) for n in range(8)]
    assert windows == [[]] * 8


def test_rank_that_recovered_and_is_slow_again_is_named_again() -> None:
    comparison = PaceComparison(1.5)
    pattern = [3.0, 3.0, 1.0, 3.0, 3.0]
    assert [named(comparison, 1.0, slow) for slow in pattern] == [[], [1], [], [], [1]]


def test_stages_are_not_compared_with_each_other() -> None:
    comparison = PaceComparison(1.5)
    for _ in range(3):
        assert named(comparison, 1.0, 5.0, 1.0, 5.0, stages=2) == []
    alone = [Pace(0, 1.0), Pace(1, 9.0)]
    assert comparison.of(alone) == (None, [])


def test_slowest_rank_is_measured_against_the_median_of_its_peers() -> None:
    slowest, _ = PaceComparison(9.0).of([Pace(0, 1.0), Pace(0, 1.2), Pace(0, 1.0), Pace(0, 4.0)])
    assert slowest == (3, 4.0)


def test_healthy_ranks_with_noise_are_not_named_in_a_thousand_windows() -> None:
    comparison, noise = PaceComparison(1.5), random.Random(0)
    for _ in range(1000):
        # One window in a hundred is spoilt for some rank, as by a neighbour's job.
        slow = [3.0 if noise.random() < 0.01 / 16 else 1.0 for _ in range(16)]
        seconds = [spoilt * noise.lognormvariate(0, 0.1) for spoilt in slow]
        assert named(comparison, *seconds) == []


def _slow_rank_1(rank: int, world_size: int) -> tuple[list[dict[str, float]], list[str]]:
    """What is measured in six steps of two data ranks, and what is said."""
    recipe = tiny_recipe("parallel.data=2", "reliability.straggler_every=3")
    run, said = Phi4Model.run, []

    def slow_run(*args: object, **options: object) -> object:
        compute(0.2 if rank == 1 else 0.0)
        return run(*args, **options)

    with engine_on(rank, recipe) as engine, patch.object(Phi4Model, "run", slow_run):
        context = Mock(recipe=recipe, engine=engine, platform=engine.platform, say=said.append)
        (hook,) = stragglers(context)
        hook.start(RunState())
        measured = []
        for step in range(6):
            engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-2)
            # Passes without gradients are no steps of the run.
            engine.evaluate(batches_of(engine, step), NextToken())
            measured.append(hook.measure(Mock(step=step + 1)))
        hook.close()
        assert engine.forward_timer is None
    return measured, said


@pytest.mark.slow
def test_rank_that_computes_more_is_named_with_its_host() -> None:
    (measured, said), (measured_by_1, said_by_1) = run_ranks(2, _slow_rank_1)
    assert measured == measured_by_1 and [bool(numbers) for numbers in measured[:3]] == [0, 0, 1]
    assert measured[5]["slowest_rank"] == 1 and measured[5]["slowest_rank_factor"] > 1.5
    (line,) = said
    assert line.startswith(f"straggler: rank 1 on {socket.gethostname()} takes ")
    assert "at step 6" in line and said_by_1 == []
