"""The files of a run's attempts: `attempts/0000007.json`, created exclusively, replaced whole.

Every start of a run is an attempt with a number. A file is only ever created where there is none,
which NFS and Lustre do atomically too, so two starts cannot both have a number.
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
    """UTC, for people."""
    has_begun: bool = False
    """Whether anything else was written into the run directory."""
    ended: str = ""
    """How it gave the directory back; empty while it owns it."""
    started_unix: float = 0.0
    """Seconds since the epoch; 0 in files of version 0.1."""
    ended_unix: float = 0.0
    """Likewise; 0 while it runs, and where it was killed together with its launcher."""
    outcome: Outcome = ""
    """What became of its training; empty while it runs, and where it was killed."""
    reason: str = ""
    """One line why it ended before its last step."""
    preempted: bool | None = None
    """Whether its time was over and not its work: the cluster starts it again. None if unknown."""
    seconds: dict[str, float] = {}
    """Wall time by bucket after the last line of metrics.jsonl that it wrote."""

    def describe(self) -> str:
        """Who, where and since when."""
        job = f", Slurm job {self.job}" if self.job else ""
        return f"pid {self.process.pid} on {self.process.host}{job}, since {self.started_at}"


def attempt_path(run_dir: Path, number: int) -> Path:
    """The file of an attempt."""
    return run_dir / ATTEMPTS_DIR / f"{number:07d}.json"


def newest_attempt(run_dir: Path) -> int:
    """The highest number of an attempt; 0 without any."""
    try:
        names = os.listdir(run_dir / ATTEMPTS_DIR)
    except FileNotFoundError:
        names = []
    number = max((int(m.group(1)) for m in map(_NAME.fullmatch, names) if m), default=0)
    # A cached listing may lack attempts that other hosts made since.
    while attempt_path(run_dir, number + 1).exists():
        number += 1
    return number


def read_attempt(path: Path) -> Attempt | None:
    """An attempt's record; None without the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlatformError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(content, type=Attempt)
    except msgspec.DecodeError:
        # Its writer is between creating and writing it, or died there: only its time can tell.
        return Attempt(Process("an unknown host", "", 0, 0), "", "an unknown time")


def trace_of(path: Path) -> tuple[int, int] | None:
    """Time, in nanoseconds, and size of the file, which its owner changes; None without it."""
    try:
        # NFS asks the server when a file is opened; a plain stat may come from the client's cache.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def create_attempt(path: Path, record: Attempt) -> bool:
    """Create the attempt's file; False when another start was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        # Its name may reach this host's cache later than the refusal.
        time.sleep(0.05)
        return False
    except FileNotFoundError:
        return False  # a start that left no trace removed the directory
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
    """Give an attempt's file new content, all of it or none.

    Raises:
        DiskFullError, PlatformError: as `one_line_errors`.
    """
    # A name of its own: the owner and a start that takes over may both be writing.
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
    """Turn the file system's errors into ours.

    Raises:
        DiskFullError: there is no space or quota left.
        PlatformError: any other `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"run.dir={run_dir}: no space to write the lease ({error.strerror}); free some"
            ) from None
        raise PlatformError(f"run.dir={run_dir} cannot be used: {error}") from None


def utc_text(seconds: float) -> str:
    """Seconds since the epoch as a date and time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
