"""Ranks that see different files agree, or fail together and in time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phi4.engine.agreement import (
    decided_by_writer,
    done_by_all,
    raise_together,
    wait_until_visible,
)
from phi4.engine.platform import Platform
from phi4.errors import CheckpointError, DataError, Phi4Error, PlatformError
from tests.support.ranks import gloo_group, pool_fixture

pool = pool_fixture(2)


def outcome(rank: int, world_size: int, call: Callable[[Platform], object]) -> str:
    platform = Platform("cpu", torch.device("cpu"), rank, world_size, "test")
    with gloo_group(rank, world_size):
        try:
            return str(call(platform))
        except Phi4Error as error:
            return f"{type(error).__name__}: {error}"


def decide(rank: int, world_size: int, raises: type[Exception] | None) -> str:
    def look() -> str:
        if raises is not None:
            raise raises(f"rank {rank} says no")
        return f"seen by rank {rank}"

    return outcome(rank, world_size, lambda platform: decided_by_writer(platform, look))


@pytest.mark.parametrize(
    ("raises", "expected"),
    [
        (None, "seen by rank 0"),
        (CheckpointError, "CheckpointError: rank 0 says no"),
        (PermissionError, "PlatformError: rank 0 on "),
    ],
)
def test_every_rank_gets_the_answer_of_rank_0(pool, raises, expected):
    answers = pool.run(decide, raises)
    assert all(answer.startswith(expected) for answer in answers), answers
    assert answers[0] == answers[1]


def fail_where(rank: int, world_size: int, errors: list[Exception | None]) -> str:
    return outcome(rank, world_size, lambda platform: raise_together(platform, errors[rank]))


def test_an_error_of_one_rank_is_raised_by_all(pool):
    assert (
        pool.run(fail_where, [None, DataError("b is missing")]) == ["DataError: b is missing"] * 2
    )
    assert pool.run(fail_where, [None, None]) == ["None"] * 2


def test_errors_of_two_ranks_are_both_told_and_a_repeated_one_once(pool):
    both = pool.run(fail_where, [DataError("a"), CheckpointError("b")])
    assert both == ["DataError: a; b"] * 2
    assert pool.run(fail_where, [DataError("a"), DataError("a")]) == ["DataError: a"] * 2


def do_where(rank: int, world_size: int, errors: list[Exception | None]) -> str:
    def act() -> str:
        if errors[rank] is not None:
            raise errors[rank]
        return f"done by {rank}"

    return outcome(rank, world_size, lambda platform: done_by_all(platform, act))


def test_a_rank_that_fails_alone_is_named_by_all(pool):
    assert pool.run(do_where, [None, None]) == ["done by 0", "done by 1"]
    alone = pool.run(do_where, [None, FileNotFoundError("tokens.bin")])
    assert alone[0] == alone[1] and alone[0].startswith("PlatformError: rank 1 on ")
    assert alone[0].endswith(": tokens.bin")


def test_an_error_that_all_ranks_share_is_told_once(pool):
    assert pool.run(do_where, [DataError("bad"), DataError("bad")]) == ["DataError: bad"] * 2


def look_for(rank: int, world_size: int, directory: Path) -> str:
    # Rank 1 looks under another name: the file system shows it nothing.
    path = directory if rank == 0 else directory / "unseen"
    return outcome(
        rank, world_size, lambda platform: wait_until_visible(platform, [path], seconds=0.2)
    )


def test_a_rank_that_does_not_see_the_directory_is_named_by_all(pool, tmp_path):
    answers = pool.run(look_for, tmp_path)
    assert answers[0] == answers[1]
    assert answers[0].startswith("PlatformError: rank 1 on ")
    assert str(tmp_path) in answers[0]


def test_one_process_needs_no_group():
    alone = Platform("cpu", torch.device("cpu"), 0, 1, "test")
    assert decided_by_writer(alone, lambda: 5) == 5
    with pytest.raises(PlatformError, match="does not see"):
        wait_until_visible(alone, [Path("/nowhere")], seconds=0)
