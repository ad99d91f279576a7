"""Ranks that stop or wait for ever: real processes, a real collective that never ends."""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from phi4.config import ReliabilityConfig
from phi4.engine.platform import connect, disconnect
from phi4.launch import report_errors
from phi4.launch.worker import ErrorReport, read_reports
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.watchdog import AwakeClock, watched
from tests.support.ranks import RankError, rendezvous, run_ranks

SOON = {"silence_seconds": 10.0, "hang_seconds": 600.0}


def _environment(rank: int, world_size: int, directory: Path) -> dict[str, str]:
    return {
        "PHI4_RENDEZVOUS": "met elsewhere",
        "PHI4_ERROR_FILE": str(directory / f"rank_{rank}.json"),
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
    }


def _in_a_collective(
    rank: int,
    world_size: int,
    directory: Path,
    victims: Sequence[int],
    limits: dict[str, float],
    stops: bool,
) -> None:
    """All ranks wait in a barrier, but for some that stop, or live and do something else."""
    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=rendezvous())
    phases, config = Phases(), ReliabilityConfig(**limits)
    os.dup2(os.open(directory / f"stderr_{rank}", os.O_CREAT | os.O_WRONLY), 2)
    reported = report_errors(_environment(rank, world_size, directory))
    with reported, watched(platform, phases, config, lambda text: None):
        dist.barrier()
        with phases.during("save" if rank in victims else "step", 20):
            if rank in victims and stops:
                os.kill(os.getpid(), signal.SIGSTOP)
            elif rank in victims:
                threading.Event().wait()
            dist.barrier()


def _reports(directory: Path, num_ranks: int, *arguments: object) -> list[ErrorReport]:
    with pytest.raises(RankError):
        run_ranks(num_ranks, _in_a_collective, directory, *arguments)
    return read_reports(directory)


@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_rank_is_named_by_the_living_with_their_stacks(tmp_path, victim: int) -> None:
    first, *_ = _reports(tmp_path, 3, [victim], SOON, True)
    assert first.type == "HungError" and first.exit_code == 7 and first.rank != victim
    assert first.message.startswith(f"rank {victim} on ")
    assert "no sign of life for 10 s" in first.message
    stacks = (tmp_path / f"stderr_{first.rank}").read_text()
    assert first.message in stacks and "in barrier" in stacks


def test_ranks_of_a_host_that_is_lost_without_a_reset_are_named_together(tmp_path) -> None:
    first, *_ = _reports(tmp_path, 4, [2, 3], SOON, True)
    assert first.exit_code == 7 and first.rank in (0, 1)
    assert first.message.startswith("rank 2 on ") and "; rank 3 on " in first.message


def test_living_rank_that_all_wait_for_is_named_with_its_phase(tmp_path) -> None:
    limits = {"silence_seconds": 30.0, "hang_seconds": 10.0}
    first, *_ = _reports(tmp_path, 3, [2], limits, False)
    assert first.exit_code == 7
    assert "no rank made progress for 10 s" in first.message
    assert "behind: rank 2 on " in first.message
    assert "into phase save after step 20" in first.message


def _to_its_end(rank: int, world_size: int) -> list[str]:
    """Two runs in one process, each watched to its end; what was said, and threads left over."""
    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=rendezvous())
    said: list[str] = []
    for _ in range(2):
        with watched(platform, Phases(), ReliabilityConfig(), said.append):
            dist.barrier()
    said += [thread.name for thread in threading.enumerate() if thread.name == "phi4-heartbeat"]
    disconnect()
    return said


def test_run_that_ends_is_left_in_peace() -> None:
    assert run_ranks(2, _to_its_end) == [[], []]


def test_single_process_is_watched_too() -> None:
    (said,) = run_ranks(1, _alone)
    # A third line may follow where the end is slow to come.
    assert said[:2] == [
        "watchdog: no rank made progress",
        "watchdog: the ranks make progress again",
    ]


def _alone(rank: int, world_size: int) -> list[str]:
    said: list[str] = []
    reported, went_on = threading.Event(), threading.Event()

    def say(text: str) -> None:
        said.append(text.partition(" for ")[0])
        (went_on if reported.is_set() else reported).set()

    config = ReliabilityConfig(silence_seconds=0.5, hang_seconds=600.0)
    platform, phases = connect("cpu"), Phases()
    with watched(platform, phases, config, say):
        reported.wait()
        phases.tick()
        went_on.wait()
    disconnect()
    return said


def test_time_in_which_a_process_was_stopped_does_not_count() -> None:
    # In this module only: the threads of the test runner read the clock, too.
    with patch("phi4.train.reliability.watchdog.time") as module:
        module.monotonic.side_effect = [100.0, 101.0, 161.0, 162.0]
        clock = AwakeClock(2.0)
        assert [clock.now() for _ in range(3)] == [1.0, 3.0, 4.0]
