"""The command that times the engine's step beside a plain transformers loop.

What it measures depends on the machine, so `make prove-step-time` holds it to its bound.
"""

from unittest import mock

import numpy as np
import pytest

from phi4.convert.hf_config import hf_config
from tests.support.ranks import RankError, run_ranks
from tools import step_time
from tools.step_time import (
    benchmark_recipe,
    compare,
    host_batches,
    keeps_bound,
    ratio_interval,
    time_steps,
)


def _compare(rank: int, world_size: int) -> dict:
    return compare(pairs=2, documents_per_row=4)


def _compare_unequal(rank: int, world_size: int) -> None:
    def other_eps(*args, **kwargs) -> dict:
        return hf_config(*args, **kwargs) | {"rms_norm_eps": 2e-5}

    with mock.patch.object(step_time, "hf_config", other_eps):
        compare(pairs=1)


@pytest.mark.parametrize(
    ("interval", "keeps"), [((0.98, 1.02), True), ((1.08, 1.3), True), ((1.11, 1.2), False)]
)
def test_only_an_interval_above_the_bound_breaks_it(interval, keeps):
    assert keeps_bound({"cpu_ratio_95": list(interval)}) == keeps


@pytest.mark.slow
def test_a_row_names_the_faster_side_of_transformers():
    [row] = run_ranks(1, _compare)
    assert row["threads"] == 1
    assert row["attention"] in step_time.ATTENTION_BACKENDS
    lower_end, upper_end = row["cpu_ratio_95"]
    assert 0 < lower_end <= row["cpu_ratio"] <= upper_end


@pytest.mark.slow
def test_sides_that_compute_different_losses_are_not_timed():
    with pytest.raises(RankError, match="differs by"):
        run_ranks(1, _compare_unequal)


def test_ratio_and_interval_of_known_times():
    theirs = np.linspace(1.0, 3.0, 41)
    ratio, low, high = ratio_interval(theirs * np.linspace(1.0, 1.2, 41), theirs)
    assert ratio == 1.1
    assert 1.0 < low < 1.1 < high < 1.2


def test_every_other_pair_begins_with_the_other_side():
    order = []
    steps = [lambda _, name=name: order.append(name) for name in "ab"]
    times = time_steps(steps, lambda index: [], 4)
    assert "".join(order) == "abbaabba"
    assert times.shape == (4, 2, 2)
    assert (times >= 0).all()


@pytest.mark.parametrize("documents_per_row", [1, 4])
def test_batches_are_the_stated_size(documents_per_row):
    batches = host_batches(benchmark_recipe(2), documents_per_row, 0)
    assert [batch.tokens.shape for batch in batches] == [(2, 256)] * 4
    assert [len(batch.cu_seqlens) - 1 for batch in batches] == [2 * documents_per_row] * 4
