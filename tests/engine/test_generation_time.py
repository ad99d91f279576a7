"""The command that times generation: what it counts, and what it refuses to time.

`make prove-generation-time` holds it to its bound.
"""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tools.generation_time import (
    BLOCK_TOKENS,
    Generate,
    Sizes,
    compare,
    compare_steps,
    keeps_bound,
)

SMALL = Sizes(
    batches=(1, 2),
    prompt_tokens=4,
    step_tokens=(2, 4),
    prefix_tokens=32,
    num_samples=5,
    sampled_tokens=(3,),
)


@pytest.mark.slow
def test_a_row_has_every_case_and_counts_the_prefix_once():
    [row] = run_ranks(1, _compare)
    assert row["threads"] == 1
    assert list(row["step"]) == ["1", "2"]
    for case in row["step"].values():
        assert case["engine_cpu_ms"] > 0 < case["transformers_cpu_ms"]
    [(num_new, case)] = row["samples"].items()
    block_bytes = 2 * 4 * 2 * 16 * 4 * BLOCK_TOKENS
    assert num_new == "3"
    assert case["kv_bytes_shared"] == 2 * block_bytes
    assert case["kv_bytes"] == (2 + 5 * 1) * block_bytes
    assert case["kv_bytes_of_separate_sequences"] == 5 * 34 * block_bytes // BLOCK_TOKENS


@pytest.mark.parametrize(("slowest", "keeps"), [(8.1, True), (7.9, False)])
def test_every_case_of_samples_counts(slowest, keeps):
    cases = {"8": {"cpu_speedup_95": [9.0, 12.0]}, "64": {"cpu_speedup_95": [7.0, slowest]}}
    assert keeps_bound({"samples": cases}) == keeps


def test_a_step_is_timed_by_the_difference_of_two_lengths():
    clock = SimpleNamespace(now=0.0)
    ours = make_side(clock, prefill=5.0, step=0.02)
    theirs = make_side(clock, prefill=1.0, step=0.04)

    read = {"perf_counter": lambda: clock.now, "process_time": lambda: clock.now}
    with mock.patch.multiple("tools.step_time.time", **read):
        row = compare_steps(ours, {"sdpa": theirs}, 3, 4, Sizes())
    assert row["cpu_ratio"] == row["ratio"] == 0.5
    assert (row["engine_cpu_ms"], row["transformers_cpu_ms"]) == (20.0, 40.0)


def test_sides_that_draw_different_tokens_are_not_timed():
    clock = SimpleNamespace(now=0.0)
    ours, other = make_side(clock), make_side(clock, token=1)

    with pytest.raises(RuntimeError, match="greedy tokens of eager differ"):
        compare_steps(ours, {"sdpa": ours, "eager": other}, 1, 1, SMALL)


def make_side(
    clock: SimpleNamespace, prefill: float = 0.0, step: float = 0.0, token: int = 0
) -> Generate:
    """A side that takes known times and repeats a token."""

    def generate(prompts_BT: np.ndarray, *, num_new: int) -> np.ndarray:
        clock.now += prefill + step * num_new
        return np.full((len(prompts_BT), num_new), token)

    return generate


# What follows runs in the rank.


def _compare(rank: int, world_size: int) -> dict:
    return compare(pairs=1, sample_pairs=1, sizes=SMALL)
