"""Real ranks for tests: worker processes on this machine's CPU that share a gloo group.

Workers are forked from one server process that has already imported torch and megatron-core, so
only the first rank of a test session takes 5 s to start. They meet in a fresh directory per call:
no ports, no host names.
"""

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

OUR_MODULES = r"phi4(_kernels)?(\.|$)"
"""Warnings attributed to these modules are errors, in tests and in their ranks."""

_PRELOADED = ("torch.distributed", "megatron.core.models.gpt", "megatron.core.dist_checkpointing")
_GRACE_SECONDS = 1.0
_ECHO = re.compile(r"(closed|reset) by peer|Broken pipe")
"""What a rank says when another one broke."""


class RankError(Exception):
    """A rank raised, died or did not return in time. The guilty rank's traceback is the message.

    Attributes:
        rank: the guilty rank; the lowest one that had not returned after a timeout.
    """

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True)
class _Outcome:
    rank: int
    finished_seconds: float
    value: Any = None
    failure: str | None = None
    died: bool = False


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 120
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` once in each of world_size fresh processes.

    Args:
        world_size: number of processes.
        fn: importable top-level function; no process group exists when it is called.
        args: picklable; every rank gets its own copy.
        timeout_seconds: for all ranks to return.

    Returns:
        What the ranks returned, by rank.

    Raises:
        RankError: as `RankPool.run`.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args, timeout_seconds=timeout_seconds)


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

    def run(self, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 120) -> list[Any]:
        """Call `fn(rank, world_size, *args)` once in every rank; see `run_ranks`.

        Environment, random state and process groups of a call do not reach the next one.

        Raises:
            RankError: a rank raised, died or did not return in time; all ranks are killed.
        """
        if not self._workers:
            self._workers = [_start(rank) for rank in range(self.world_size)]
        with tempfile.TemporaryDirectory(prefix="phi4_ranks_") as directory:
            try:
                call = pickle.dumps((fn, args, self.world_size, directory, dict(os.environ)))
                for worker in self._workers:
                    worker.pipe.send_bytes(call)
                return self._collect(time.monotonic() + timeout_seconds, Path(directory))
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

    def _collect(self, deadline: float, directory: Path) -> list[Any]:
        outcomes: dict[int, _Outcome] = {}
        while len(outcomes) < self.world_size:
            arrived = self._receive(outcomes, deadline)
            if not arrived:
                raise self._timeout(outcomes, directory)
            if any(outcome.failure for outcome in arrived):
                # Peers of a broken rank fail too; give the first cause time to arrive.
                self._receive(outcomes, time.monotonic() + _GRACE_SECONDS, everything=True)
                raise _first_cause(outcomes, self.world_size)
        return [outcomes[rank].value for rank in range(self.world_size)]

    def _receive(
        self, outcomes: dict[int, _Outcome], deadline: float, everything: bool = False
    ) -> list[_Outcome]:
        arrived: list[_Outcome] = []
        while len(outcomes) < self.world_size and (everything or not arrived):
            silent = {r: w for r, w in enumerate(self._workers) if r not in outcomes}
            # A dead rank's pipe stays open while a process that it started lives.
            signs = [sign for w in silent.values() for sign in (w.pipe, w.process.sentinel)]
            ready = set(wait(signs, max(0.0, deadline - time.monotonic())))
            if not ready:
                break
            for rank, worker in silent.items():
                if worker.pipe in ready or worker.process.sentinel in ready:
                    outcomes[rank] = _read(rank, worker)
                    arrived.append(outcomes[rank])
        return arrived

    def _timeout(self, outcomes: dict[int, _Outcome], directory: Path) -> RankError:
        late = [rank for rank in range(self.world_size) if rank not in outcomes]
        for rank in late:
            os.kill(self._workers[rank].process.pid, signal.SIGUSR2)
        time.sleep(0.3)
        stacks = "\n".join(
            f"rank {rank} is at:\n{(directory / f'stack_{rank}').read_text()}"
            for rank in late
            if (directory / f"stack_{rank}").exists()
        )
        names = ", ".join(map(str, late))
        text = f"ranks {names} of {self.world_size} did not return in time\n{stacks}"
        return RankError(late[0], text)


def rendezvous() -> str:
    """Inside a rank: a directory to meet in, as `phi4.engine.platform.connect` takes it.

    The n-th call of every rank gives the same one, and no two calls share one.
    """
    directory = _place / f"meeting_{next(_meetings)}"
    directory.mkdir(exist_ok=True)
    return str(directory)


@contextlib.contextmanager
def gloo_group(rank: int, world_size: int) -> Iterator[None]:
    """Inside a rank: a default process group for tests that do without the engine."""
    import torch.distributed as dist

    store = dist.FileStore(f"{rendezvous()}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


_place = Path()
_meetings = itertools.count()


def _start(rank: int) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    ours, theirs = context.Pipe()
    # Not daemonic: megatron-core's checkpoint writer starts processes of its own.
    process = context.Process(target=_serve, args=(rank, theirs))
    with _environment(os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}):
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _read(rank: int, worker: _Worker) -> _Outcome:
    with contextlib.suppress(EOFError, ConnectionResetError):
        if worker.pipe.poll():
            return pickle.loads(worker.pipe.recv_bytes())
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return _Outcome(rank, time.monotonic(), failure=f"died of {how}\n", died=True)


def _first_cause(outcomes: dict[int, _Outcome], world_size: int) -> RankError:
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


def _serve(rank: int, pipe: Connection) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_the_tests, daemon=True).start()
    warnings.filterwarnings("error", module=OUR_MODULES)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send_bytes(_answer(rank, pipe.recv_bytes()))


def _die_with_the_tests() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _answer(rank: int, call: bytes) -> bytes:
    try:
        fn, args, world_size, directory, environment = pickle.loads(call)
        with _environment(environment | {"GLOO_SOCKET_IFNAME": "lo"}), _fresh(rank, directory):
            value = fn(rank, world_size, *args)
        return pickle.dumps(_Outcome(rank, time.monotonic(), value=value))
    except BaseException:
        failed_seconds = time.monotonic()
        return pickle.dumps(_Outcome(rank, failed_seconds, failure=traceback.format_exc()))


@contextlib.contextmanager
def _fresh(rank: int, directory: str) -> Iterator[None]:
    global _place, _meetings
    import numpy
    import torch
    import torch.distributed as dist

    _place, _meetings = Path(directory), itertools.count()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    with (_place / f"stack_{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=False)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR2)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
