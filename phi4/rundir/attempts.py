"""The files of a run's attempts: `attempts/0000007.json`, created exclusively, replaced atomically.

Every start of a run is an attempt with a number. A file is only created if it does not exist, which
is atomic on NFS and Lustre too, so two starts cannot get the same number.
"""

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from phi4.errors import DiskFullError, PlatformError
from phi4.rundir.names import ATTEMPTS_DIR
from phi4.rundir.process import Process

Outcome = Literal["", "finished", "failed", "interrupted"]

_NAME = re.compile(r"(\d{7,})\.json")


class Attempt(msgspec.Struct, frozen=True):
    """The content of an attempt's file."""

    process: Process
    job: str
    """Slurm job id; empty outside Slurm."""
    started_at: str
    """Start time in UTC, for people."""
    has_begun: bool = False
    """Whether it wrote anything else into the run directory."""
    ended: str = ""
    """How it released the directory; empty while it owns it."""
    started_unix: float = 0.0
    """Seconds since the epoch; 0 in files of version 0.1."""
    ended_unix: float = 0.0
    """End time; 0 while it runs, and if it was killed together with its launcher."""
    outcome: Outcome = ""
    """Outcome of its training; empty while it runs, and if it was killed."""
    reason: str = ""
    """One-line reason for ending before its last step."""
    preempted: bool | None = None
    """Whether it ended for lack of time before its work was done, so that the cluster starts it
    again. None if unknown."""
    seconds: dict[str, float] = {}
    """Wall time by bucket after the last line of metrics.jsonl that it wrote."""

    def describe(self) -> str:
        """Describe the process, its host and its start time."""
        job = f", Slurm job {self.job}" if self.job else ""
        return f"pid {self.process.pid} on {self.process.host}{job}, since {self.started_at}"


def attempt_path(run_dir: Path, number: int) -> Path:
    """Return the path of an attempt's file."""
    return run_dir / ATTEMPTS_DIR / f"{number:07d}.json"


def newest_attempt(run_dir: Path) -> int:
    """Return the highest attempt number, or 0 if there is none."""
    try:
        names = os.listdir(run_dir / ATTEMPTS_DIR)
    except FileNotFoundError:
        names = []
    number = max((int(m.group(1)) for m in map(_NAME.fullmatch, names) if m), default=0)
    # A cached listing may lack attempts that other hosts have made since.
    while attempt_path(run_dir, number + 1).exists():
        number += 1
    return number


def read_attempt(path: Path) -> Attempt | None:
    """Return an attempt's record; None without the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlatformError(
            f"{path} cannot be read: {error.strerror}; check the file system of the run directory"
        ) from None
    try:
        return msgspec.json.decode(content, type=Attempt)
    except msgspec.DecodeError:
        # Its writer is between creating and writing it, or died there: only its modification time
        # is known.
        return Attempt(Process("an unknown host", "", 0, 0), "", "an unknown time")


def trace_of(path: Path) -> tuple[int, int] | None:
    """Return modification time, in nanoseconds, and size of the file, which its owner changes; None
    if it does not exist."""
    try:
        # NFS revalidates a file when it is opened; a plain stat may come from the client's cache.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def create_attempt(path: Path, record: Attempt) -> bool:
    """Create the attempt's file; return False if another start created it first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        # Its name may reach this host's cache later than the error.
        time.sleep(0.05)
        return False
    except FileNotFoundError:
        return False  # A start that released its lease removed the directory.
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise
    return True


def replace_attempt(path: Path, record: Attempt) -> None:
    """Replace the content of an attempt's file atomically.

    Raises:
        DiskFullError, PlatformError: as `one_line_errors`.
    """
    # A unique name: the owner and a start that takes over may both be writing.
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    with one_line_errors(path.parent.parent):
        try:
            partial.write_bytes(msgspec.json.encode(record))
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def one_line_errors(run_dir: Path) -> Iterator[None]:
    """Convert the file system's errors to ours.

    Raises:
        DiskFullError: there is no space or quota left.
        PlatformError: any other `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"run.dir={run_dir}: no space to write the lease ({error.strerror}); free some "
                f"space"
            ) from None
        raise PlatformError(
            f"run.dir={run_dir} cannot be used ({error.strerror}: {error.filename}); name a "
            "directory that this user can create and write to"
        ) from None


def utc_text(seconds: float) -> str:
    """Format seconds since the epoch as a date and time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
