"""One run, one owner: who gets a run directory, who is refused, and who loses it.

The owner of a test is a process that is named, not one that runs: a pid that is free, a host that
does not exist. The heartbeat of such an owner is the test's own.
"""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from phi4.errors import DiskFullError, OwnershipError, PlatformError
from phi4.rundir import Lease, Process, held_lease, inherited_lease, require_free, this_process
from phi4.rundir.lease import take_lease
from tests.support.waiting import LONG_SECONDS

HERE = this_process()
ELSEWHERE = msgspec.structs.replace(HERE, host="other", pid=1)
REBOOTED = msgspec.structs.replace(HERE, kernel="another boot")


def take(run_dir: Path, process: Process = HERE, expiry_seconds: float = 0.2, **options) -> Lease:
    said = options.pop("said", [])
    return take_lease(
        run_dir, job="47", say=said.append, process=process, expiry_seconds=expiry_seconds
    )


def files(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def dead() -> Process:
    """A process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = msgspec.structs.replace(HERE, pid=child.pid)
    child.wait()
    return process


def test_second_start_names_the_owner_and_touches_nothing(tmp_path: Path) -> None:
    lease = take(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(OwnershipError) as refused:
        take(tmp_path / "run")
    assert refused.value.exit_code == 3
    message = str(refused.value)
    for part in (f"pid {os.getpid()} on {HERE.host}", "Slurm job 47", "attempt 1", "heartbeat 2"):
        assert part in message, message
    assert "\n" not in message and files(tmp_path) == before
    with pytest.raises(OwnershipError):
        require_free(tmp_path / "run", say=print)
    lease.check()


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(dead, id="ended"),
        pytest.param(lambda: msgspec.structs.replace(HERE, started_ticks=1), id="reused-pid"),
    ],
)
def test_dead_owner_of_this_host_is_followed_at_once(tmp_path: Path, owner) -> None:
    take(tmp_path, owner()).begin()
    said = []
    assert take(tmp_path, said=said).number == 2 and said == []


def test_unreaped_owner_is_dead(tmp_path: Path) -> None:
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    ticks = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19])
    take(tmp_path, msgspec.structs.replace(HERE, pid=child, started_ticks=ticks)).begin()
    assert take(tmp_path).number == 2
    os.waitpid(child, 0)


@pytest.mark.parametrize("owner", [ELSEWHERE, REBOOTED])
def test_silent_owner_of_another_host_is_followed_after_a_while(tmp_path: Path, owner) -> None:
    lease, said = take(tmp_path, owner), []
    lease.begin()
    assert take(tmp_path, said=said).number == 2
    assert "watching it for up to" in said[0]
    with pytest.raises(OwnershipError, match=r"taken over by pid .* attempt 1 stops here") as lost:
        lease.check()
    assert lost.value.exit_code == 3


def test_living_owner_of_another_host_keeps_the_directory(tmp_path: Path) -> None:
    lease = take(tmp_path, ELSEWHERE)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            lease.touch()

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(OwnershipError, match="pid 1 on other"):
        take(tmp_path, expiry_seconds=60)
    stop.set()
    beating.join()


def test_clocks_that_disagree_do_not_matter(tmp_path: Path) -> None:
    future = take(tmp_path / "a", ELSEWHERE)
    os.utime(future.path, (2**32, 2**32))
    assert take(tmp_path / "a").number == 2


def test_owner_that_wakes_up_late_cannot_disturb_its_successor(tmp_path: Path) -> None:
    late = take(tmp_path, ELSEWHERE)
    late.begin()
    successor = take(tmp_path)
    successor.begin()
    before = files(tmp_path)
    with pytest.raises(OwnershipError):
        late.begin()
    late.release()
    assert files(tmp_path) == before
    successor.check()


def test_owner_notices_even_when_its_successor_left_no_trace(tmp_path: Path) -> None:
    late = take(tmp_path, ELSEWHERE)
    late.begin()
    take(tmp_path).release()
    with pytest.raises(OwnershipError):
        late.check()


def test_owner_notices_that_the_directory_was_removed(tmp_path: Path) -> None:
    lease = take(tmp_path / "run")
    lease.path.unlink()
    with pytest.raises(OwnershipError, match="no longer has"):
        lease.check()


def test_directory_is_free_again_after_a_release(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with held_lease(tmp_path, job="", say=print) as lease:
            assert lease.number == number
            lease.begin()
            inherited_lease(tmp_path, number).check()
    require_free(tmp_path, say=print)


def test_attempt_that_never_began_leaves_no_trace(tmp_path: Path) -> None:
    with held_lease(tmp_path / "new" / "run", job="", say=print):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with held_lease(tmp_path / "old", job="", say=print) as lease:
        lease.begin()
    before = files(tmp_path)
    with held_lease(tmp_path / "old", job="", say=print):
        pass
    assert files(tmp_path) == before


def compete(run_dir: Path, start: "threading.Barrier", winners: "multiprocessing.Queue") -> None:
    start.wait()
    try:
        winners.put(take(run_dir, this_process(), expiry_seconds=30).number)
    except OwnershipError:
        winners.put(None)
    start.wait()


def test_of_many_that_find_the_owner_dead_one_takes_over(tmp_path: Path) -> None:
    take(tmp_path, dead()).begin()
    fork = multiprocessing.get_context("fork")
    start, winners = fork.Barrier(8), fork.Queue()
    racers = [fork.Process(target=compete, args=(tmp_path, start, winners)) for _ in range(8)]
    for racer in racers:
        racer.start()
    results = [winners.get(timeout=LONG_SECONDS) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(results, key=str) == [2, *[None] * 7]


def test_listing_that_lags_behind_is_caught_up_with(tmp_path: Path) -> None:
    for _ in range(2):
        with held_lease(tmp_path, job="", say=print) as lease:
            lease.begin()
    with patch("phi4.rundir.attempts.os.listdir", return_value=["0000001.json"]):
        assert take(tmp_path).number == 3


def test_half_written_attempt_counts_as_an_owner_until_it_is_silent(tmp_path: Path) -> None:
    lease = take(tmp_path)
    lease.path.write_bytes(b"")
    said = []
    assert take(tmp_path, said=said).number == 2
    assert "an unknown host" in said[0]


def test_heartbeat_needs_no_space_and_the_lease_says_when_there_is_none(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    lease = take(tmp_path)
    with (
        patch("phi4.rundir.attempts.os.fsync", side_effect=full),
        patch.object(Path, "write_bytes", side_effect=full),
    ):
        lease.touch()
        lease.check()
        with pytest.raises(DiskFullError, match=f"run.dir={tmp_path}"):
            lease.begin()
        with pytest.raises(DiskFullError) as refused:
            take(tmp_path / "new")
    assert refused.value.exit_code == 4 and not list((tmp_path / "new").rglob("*.json"))


def test_run_dir_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlatformError, match="cannot be"):
        take(tmp_path / "file")
