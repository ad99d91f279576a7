"""Real ranks for tests: worker processes on this machine's CPU that share a gloo group.

Workers are forked from one server process that has already imported torch and megatron-core, so
only the first rank of a test session takes 5 s to start. They meet in a fresh directory per call:
no ports, no host names.
"""

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests.support.process_tree import tree_seconds
from tests.support.rank_process import Outcome, environment, gloo_group, rendezvous, serve
from tests.support.waiting import LONG_SECONDS

__all__ = ["RankError", "RankPool", "gloo_group", "rendezvous", "run_ranks"]

_PRELOADED = ("tests.support.preloaded",)
_ROOT = Path(__file__).parents[2]
_GRACE_SECONDS = 1.0
_LONGEST_GRACE_SECONDS = 5.0
"""Peers of a broken rank that wait for it by polling are active for ever."""

_STACK_SECONDS = 20.0
_IDLE_SECONDS = 60.0
_IDLE_SHARE = 0.01
"""Ranks that together use less of one processor than this do nothing."""

_ECHO = re.compile(r"(closed|reset) by peer|Broken pipe")
"""What a rank says when another one broke."""


class RankError(Exception):
    """A rank raised, died or hangs. The guilty rank's traceback is the message.

    Attributes:
        rank: the guilty rank; among ranks that hang, the lowest.
    """

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, idle_seconds: float = _IDLE_SECONDS
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` once in each of world_size fresh processes.

    Args:
        world_size: number of processes.
        fn: importable top-level function; no process group exists when it is called.
        args: picklable; every rank gets its own copy.
        idle_seconds: ranks that have not returned and use no processor time for so long hang. A
            busy machine delays ranks, and they go on using some. After LONG_SECONDS without a
            returning rank they hang whatever they use.

    Returns:
        What the ranks returned, by rank.

    Raises:
        RankError: as `RankPool.run`.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args, idle_seconds=idle_seconds)


class RankPool:
    """Ranks that stay alive between calls, for a test module to share.

    Args:
        world_size: number of processes; they start at the first call, and again after a failure.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[_Worker] = []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, fn: Callable[..., Any], *args: Any, idle_seconds: float = _IDLE_SECONDS
    ) -> list[Any]:
        """Call `fn(rank, world_size, *args)` once in every rank; see `run_ranks`.

        Environment, random state and process groups of a call do not reach the next one.

        Raises:
            RankError: a rank raised, died or hangs; all ranks are killed.
        """
        if not self._workers:
            self._workers = [_start(rank) for rank in range(self.world_size)]
        with tempfile.TemporaryDirectory(prefix="phi4_ranks_") as directory:
            try:
                call = pickle.dumps((fn, args, self.world_size, directory, dict(os.environ)))
                for worker in self._workers:
                    worker.pipe.send_bytes(call)
                return self._collect(idle_seconds, Path(directory))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Kill all ranks and whatever they started."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _collect(self, idle_seconds: float, directory: Path) -> list[Any]:
        outcomes: dict[int, Outcome] = {}
        activity = _Activity(self._workers, idle_seconds)
        while len(outcomes) < self.world_size:
            arrived = self._receive(outcomes, activity.poll_seconds)
            if any(outcome.failure for outcome in arrived):
                # Peers of a broken rank fail too; give the first cause time to arrive.
                self._receive_while_active(outcomes)
                raise _first_cause(outcomes, self.world_size)
            if arrived:
                activity = _Activity(self._workers, idle_seconds)
            elif activity.has_ended():
                raise self._hang(outcomes, directory)
        return [outcomes[rank].value for rank in range(self.world_size)]

    def _receive_while_active(self, outcomes: dict[int, Outcome]) -> None:
        activity = _Activity(self._workers, _GRACE_SECONDS, _LONGEST_GRACE_SECONDS)
        while len(outcomes) < self.world_size:
            if not self._receive(outcomes, activity.poll_seconds) and activity.has_ended():
                return

    def _receive(self, outcomes: dict[int, Outcome], seconds: float) -> list[Outcome]:
        """Wait for the next outcomes, at most so long."""
        silent = {r: w for r, w in enumerate(self._workers) if r not in outcomes}
        # A dead rank's pipe stays open while a process that it started lives.
        signs = [sign for w in silent.values() for sign in (w.pipe, w.process.sentinel)]
        ready = set(wait(signs, seconds)) if signs else set()
        arrived = [
            _read(rank, worker)
            for rank, worker in silent.items()
            if worker.pipe in ready or worker.process.sentinel in ready
        ]
        outcomes.update((outcome.rank, outcome) for outcome in arrived)
        return arrived

    def _hang(self, outcomes: dict[int, Outcome], directory: Path) -> RankError:
        late = [rank for rank in range(self.world_size) if rank not in outcomes]
        for rank in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].process.pid, signal.SIGUSR2)
        stacks = "\n".join(
            f"rank {rank} is at:\n{_settled_text(directory / f'stack_{rank}')}" for rank in late
        )
        names = ", ".join(map(str, late))
        text = f"ranks {names} of {self.world_size} hang\n{stacks}"
        return RankError(late[0], text)


def pool_fixture(num_ranks: int) -> Callable[[], Iterator[RankPool]]:
    """A test file's fixture, `pool = pool_fixture(2)`: ranks that live as long as its tests."""

    @pytest.fixture(scope="module")
    def pool() -> Iterator[RankPool]:
        with RankPool(num_ranks) as ranks:
            yield ranks

    return pool


def _settled_text(path: Path) -> str:
    """What a rank writes to a file on a signal, once there is some and no more comes."""
    text, deadline = "", time.monotonic() + _STACK_SECONDS
    while time.monotonic() < deadline:
        before, text = text, path.read_text() if path.exists() else ""
        if text and text == before:
            break
        time.sleep(0.3)
    return text


class _Activity:
    """Whether ranks that have not returned still do something, by the processor time they use."""

    def __init__(
        self, workers: list[_Worker], idle_seconds: float, longest_seconds: float = LONG_SECONDS
    ) -> None:
        self._longest_seconds = longest_seconds
        self._pids = [worker.process.pid for worker in workers]
        self._idle_seconds = idle_seconds
        self._used_seconds: float | None = None
        self._begun = self._idle_since = time.monotonic()
        self.poll_seconds = min(2.0, idle_seconds / 2)

    def has_ended(self) -> bool:
        """Look at the ranks again. The first look, at calls that take longer, costs a scan."""
        now, used_seconds = time.monotonic(), tree_seconds(self._pids)
        least_seconds = _IDLE_SHARE * self._idle_seconds
        if self._used_seconds is None or abs(used_seconds - self._used_seconds) > least_seconds:
            self._used_seconds, self._idle_since = used_seconds, now
        is_idle = now - self._idle_since > self._idle_seconds
        return is_idle or now - self._begun > self._longest_seconds


def _start(rank: int) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    ours, theirs = context.Pipe()
    # Not daemonic: megatron-core's checkpoint writer starts processes of its own.
    process = context.Process(target=serve, args=(rank, theirs))
    # The server ignores a module that it cannot import, and must not depend on where it starts.
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours_only = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    with environment(os.environ | ours_only):
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _read(rank: int, worker: _Worker) -> Outcome:
    with contextlib.suppress(EOFError, ConnectionResetError):
        if worker.pipe.poll():
            return pickle.loads(worker.pipe.recv_bytes())
    worker.process.join(timeout=LONG_SECONDS)
    code = worker.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return Outcome(rank, time.monotonic(), failure=f"died of {how}\n", died=True)


def _first_cause(outcomes: dict[int, Outcome], world_size: int) -> RankError:
    failed = [outcome for outcome in outcomes.values() if outcome.failure]
    # Peers notice a broken rank, and report it, before the rank's own report is here.
    guilty = min(
        failed,
        key=lambda outcome: (
            not outcome.died,
            _ECHO.search(outcome.failure) is not None,
            outcome.finished_seconds,
        ),
    )
    return RankError(guilty.rank, f"rank {guilty.rank} of {world_size}: {guilty.failure}")
