"""The ranks that other tests rely on: results by rank, isolation, who is blamed for a failure."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, RankPool, gloo_group, pool_fixture, rendezvous, run_ranks
from tests.support.waiting import wait_until

pool = pool_fixture(3)


def rank_and_arguments(rank: int, world_size: int, *args: object) -> tuple:
    assert not dist.is_initialized()
    return (rank, world_size, *args)


def sum_of_ranks(rank: int, world_size: int) -> torch.Tensor:
    with gloo_group(rank, world_size):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        return total


def sum_twice(rank: int, world_size: int) -> list[float]:
    return [sum_of_ranks(rank, world_size).item() for _ in range(2)]


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def leave_traces(rank: int, world_size: int) -> None:
    os.environ["PHI4_TEST_TRACE"] = "left"
    random.random()
    store = dist.FileStore(f"{rendezvous()}/left", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    # A rank that leaves before its peers have connected breaks their connecting.
    dist.barrier()


def look_for_traces(rank: int, world_size: int) -> tuple:
    return os.environ.get("PHI4_TEST_TRACE"), dist.is_initialized(), random.random()


def read_environment(rank: int, world_size: int, name: str) -> str | None:
    return os.environ.get(name)


def raise_on(rank: int, world_size: int, guilty: int) -> None:
    with gloo_group(rank, world_size):
        if rank == guilty:
            time.sleep(0.1)
            raise ValueError("the first cause")
        dist.all_reduce(torch.zeros(1))


def die_on(rank: int, world_size: int, guilty: int) -> None:
    with gloo_group(rank, world_size):
        if rank == guilty:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.zeros(1))


def raise_while_the_peers_poll(rank: int, world_size: int, guilty: int) -> None:
    if rank == guilty:
        raise ValueError("the first cause")
    while True:
        time.sleep(0.001)


def hang_on(rank: int, world_size: int, guilty: int) -> None:
    if rank == guilty:
        wait_for_nobody()


def wait_for_nobody() -> None:
    time.sleep(600)


def work_for(rank: int, world_size: int, seconds: float) -> int:
    """Seconds of the clock, in a child process of the last rank; the others are done at once."""
    if rank == world_size - 1:
        code = (
            f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    return rank


def start_a_child_and_hang(rank: int, world_size: int, note: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_ranks_return_values_in_rank_order(pool: RankPool) -> None:
    assert pool.run(rank_and_arguments, "a", 2) == [(r, 3, "a", 2) for r in range(3)]


def test_ranks_reach_each_other(pool: RankPool) -> None:
    assert [total.item() for total in pool.run(sum_of_ranks)] == [3.0, 3.0, 3.0]


def test_ranks_meet_twice_in_one_call(pool: RankPool) -> None:
    assert pool.run(sum_twice) == [[3.0, 3.0]] * 3


def test_run_ranks_starts_fresh_processes() -> None:
    assert set(run_ranks(2, process_id)).isdisjoint(run_ranks(2, process_id))


def test_pool_keeps_its_processes_between_calls(pool: RankPool) -> None:
    assert pool.run(process_id) == pool.run(process_id)


def test_pool_call_leaves_no_trace_for_the_next(pool: RankPool) -> None:
    before = pool.run(look_for_traces)
    pool.run(leave_traces)
    assert pool.run(look_for_traces) == before == [(None, False, before[0][2])] * 3


def test_ranks_see_the_environment_of_the_test(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI4_TEST_VARIABLE", "seen")
    assert pool.run(read_environment, "PHI4_TEST_VARIABLE") == ["seen"] * 3
    assert pool.run(read_environment, "GLOO_SOCKET_IFNAME") == ["lo"] * 3


def test_raising_rank_is_blamed_with_its_traceback(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 of 3") as failure:
        pool.run(raise_on, 1)
    assert failure.value.rank == 1
    assert "ValueError: the first cause" in str(failure.value)
    assert "in raise_on" in str(failure.value)


@pytest.mark.timeout(300)
def test_raising_rank_is_blamed_while_its_peer_polls_for_ever() -> None:
    with pytest.raises(RankError, match="the first cause"):
        run_ranks(2, raise_while_the_peers_poll, 1)


def test_killed_rank_is_blamed_and_the_pool_recovers(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 2 of 3: died of signal 9"):
        pool.run(die_on, 2)
    assert pool.run(rank_and_arguments) == [(r, 3) for r in range(3)]


def test_hanging_rank_is_named_with_its_stack(pool: RankPool) -> None:
    with pytest.raises(RankError, match="ranks 1 of 3 hang") as failure:
        pool.run(hang_on, 1, idle_seconds=3)
    assert failure.value.rank == 1
    assert "in wait_for_nobody" in str(failure.value)


def test_rank_that_works_for_long_does_not_hang(pool: RankPool) -> None:
    assert pool.run(work_for, 1.5, idle_seconds=0.7) == [0, 1, 2]


def test_hang_kills_what_the_rank_started(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    with pytest.raises(RankError):
        run_ranks(1, start_a_child_and_hang, str(note), idle_seconds=2)
    assert not any(is_alive(int(pid)) for pid in note.read_text().split())


def test_killed_test_process_takes_its_ranks_along(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = (
        "from tests.support.test_ranks import *\n"
        f"run_ranks(1, start_a_child_and_hang, {str(note)!r})"
    )
    tests = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    wait_until(lambda: note.exists() and len(note.read_text().split()) == 2, "the rank's note")
    tests.kill()
    tests.wait()
    pids = [int(pid) for pid in note.read_text().split()]
    wait_until(lambda: not any(map(is_alive, pids)), "the end of the rank and its child")
