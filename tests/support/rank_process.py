"""A rank's side of tests.support.ranks: serves calls, and starts each from a clean state."""

import contextlib
import faulthandler
import gc
import itertools
import os
import pickle
import random
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OUR_MODULES = r"phi4(_kernels)?(\.|$)"
"""Warnings attributed to these modules are errors, in tests and in their ranks."""


@dataclass(frozen=True)
class Outcome:
    """What a rank returned, or how it failed."""

    rank: int
    finished_seconds: float
    value: Any = None
    failure: str | None = None
    died: bool = False


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


def serve(rank: int, pipe: Connection) -> None:
    """Answer calls until the pipe closes."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_the_tests, daemon=True).start()
    warnings.filterwarnings("error", module=OUR_MODULES)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send_bytes(_answer(rank, pipe.recv_bytes()))


def _die_with_the_tests() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _answer(rank: int, call: bytes) -> bytes:
    try:
        fn, args, world_size, directory, variables = pickle.loads(call)
        with environment(variables | {"GLOO_SOCKET_IFNAME": "lo"}), _fresh(rank, directory):
            value = fn(rank, world_size, *args)
        return pickle.dumps(Outcome(rank, time.monotonic(), value=value))
    except BaseException:
        failed_seconds = time.monotonic()
        return pickle.dumps(Outcome(rank, failed_seconds, failure=traceback.format_exc()))


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
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These environment variables and no others."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
