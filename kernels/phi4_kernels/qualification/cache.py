"""The user's cache of rows: one process per machine qualifies at a time, the others read."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi4_kernels.evidence import Row

_POLL_SECONDS = 0.2


class RowCache:
    """A file of rows that this process may append to.

    Args:
        path: of the file.
        problem: why nothing can be kept; None where rows can be.
    """

    def __init__(self, path: Path, problem: str | None = None) -> None:
        self.path, self.problem = path, problem

    def keep(self, row: Row) -> None:
        """Append a row in one write; if that fails, `problem` holds the reason from then on."""
        if self.problem is not None:
            return
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                # Begins with a newline: the previous write may have been incomplete.
                os.write(descriptor, f"\n{json.dumps(row)}\n".encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror}"


@contextmanager
def held(path: Path, *, wait_seconds: float) -> Iterator[RowCache]:
    """Context manager that locks the cache; other processes wait for it.

    A cache that cannot be written, or that another process holds for too long, is not an error:
    results then apply to this run only.

    Args:
        path: of the file.
        wait_seconds: how long to wait for another process.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        yield RowCache(path, f"{error.filename or path}: {error.strerror}")
        return
    try:
        problem = None if _locked(descriptor, wait_seconds) else f"{path} is held by another run"
        yield RowCache(path, problem)
    finally:
        # Closing releases the lock; the kernel does so too when the process dies.
        os.close(descriptor)


def _locked(descriptor: int, wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError:
            # Some network file systems have no locks; two runs then repeat the same work.
            return True
        else:
            return True
