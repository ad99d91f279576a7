"""The lease: one run directory has one owner, the attempt with the highest number.

If two starts find the owner dead at the same time, one of them gets the next number, and no start
has to remove or rename a file that another may just have written.

An owner signals that it is alive by touching its file. Clocks are never compared: a start that
cannot see the owner's process watches whether the file changes. Touching needs no disk space, so a
full disk does not lose the lease.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import msgspec

from phi4.errors import OwnershipError, Phi4Error
from phi4.rundir.attempts import (
    Attempt,
    Outcome,
    attempt_path,
    create_attempt,
    newest_attempt,
    one_line_errors,
    read_attempt,
    replace_attempt,
    trace_of,
    utc_text,
)
from phi4.rundir.names import ATTEMPTS_DIR
from phi4.rundir.process import Process, this_process

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
"""An owner that does not touch its file for this long has lost the directory."""

_POLL_SECONDS = 0.5

Say = Callable[[str], None]


class Lease:
    """An attempt's hold on its run directory.

    Args:
        run_dir: the run directory.
        number: number of the attempt, counted from 1.
        process: the process that holds the lease.

    Attributes:
        path: the attempt's file.
    """

    def __init__(self, run_dir: Path, number: int, process: Process) -> None:
        self.run_dir = run_dir
        self.number = number
        self.path = attempt_path(run_dir, number)
        self._process = process

    def check(self) -> None:
        """Check that this attempt still owns the directory; reads one small file.

        Raises:
            OwnershipError: another start took over the directory, or it was removed.
            PlatformError: the file system does not respond.
        """
        successor = read_attempt(attempt_path(self.run_dir, self.number + 1))
        if successor is not None:
            by = f"was taken over by {successor.describe()} (attempt {self.number + 1})"
        elif self._own_record() is None:
            by = f"no longer has this run's {self.path.name} under {ATTEMPTS_DIR}/"
        else:
            return
        raise OwnershipError(
            f"{self.run_dir} {by}; attempt {self.number} stops here and writes nothing more"
        )

    def begin(self) -> None:
        """Mark this attempt as writing; from now on it counts as one.

        Raises:
            OwnershipError: the directory is no longer this attempt's.
            DiskFullError: there is no space for the note.
        """
        self.check()
        self._update(has_begun=True)

    def conclude(
        self,
        outcome: Outcome,
        *,
        reason: str = "",
        preempted: bool | None = None,
        seconds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Record how this attempt ended; fields as those of `Attempt`.

        Raises:
            DiskFullError, PlatformError: the record cannot be written.
        """
        self._update(
            outcome=outcome,
            reason=reason,
            preempted=preempted,
            seconds=dict(seconds),
            ended_unix=time.time(),
        )

    @property
    def started_unix(self) -> float:
        """Seconds since the epoch when the attempt began."""
        record = read_attempt(self.path)
        return record.started_unix if record else 0.0

    def touch(self) -> None:
        """Renew the lease by touching its file."""
        os.utime(self.path)

    def release(self) -> None:
        """Release the directory; an attempt that never began removes its own files."""
        try:
            self.check()
        except OwnershipError:
            return
        record = self._own_record()
        if record is not None and record.has_begun:
            self._update(ended="released", ended_unix=record.ended_unix or time.time())
            return
        self.path.unlink()
        # The directories are kept if they contain anything else.
        with suppress(OSError):
            self.path.parent.rmdir()
            self.run_dir.rmdir()

    def _own_record(self) -> Attempt | None:
        record = read_attempt(self.path)
        is_own = record is not None and record.process == self._process and not record.ended
        return record if is_own else None

    def _update(self, **fields: object) -> None:
        record = self._own_record()
        if record is not None:
            replace_attempt(self.path, msgspec.structs.replace(record, **fields))


@contextmanager
def held_lease(run_dir: Path, *, job: str, say: Say) -> Iterator[Lease]:
    """Own the run directory for the duration of the block.

    Args:
        run_dir: created when it does not exist.
        job: Slurm job id, or empty.
        say: reports a line to the user while it is unknown whether the owner is alive.

    Raises:
        OwnershipError: another run owns the directory.
        DiskFullError: there is no space for the lease.
        PlatformError: the directory cannot be written.
    """
    lease = take_lease(run_dir, job=job, say=say)
    stopping = threading.Event()
    beat = threading.Thread(target=_beat, args=(lease, stopping), name="lease", daemon=True)
    beat.start()
    try:
        yield lease
    finally:
        stopping.set()
        beat.join()
        # The run's own outcome has precedence; a lease that cannot be released expires by itself.
        with suppress(Phi4Error, OSError):
            lease.release()


def take_lease(
    run_dir: Path,
    *,
    job: str,
    say: Say,
    process: Process | None = None,
    expiry_seconds: float = EXPIRY_SECONDS,
) -> Lease:
    """Take the lease, also from a dead owner; `held_lease` keeps it alive and releases it.

    Raises:
        OwnershipError, DiskFullError, PlatformError: as `held_lease`.
    """
    process = process or this_process()
    now = time.time()
    record = Attempt(process, job, utc_text(now), started_unix=now)
    with one_line_errors(run_dir):
        while True:
            newest = _await_free(run_dir, process, say, expiry_seconds)
            if create_attempt(attempt_path(run_dir, newest + 1), record):
                break
        _close_books(run_dir, newest, newest + 1)
    return Lease(run_dir, newest + 1, process)


def inherited_lease(run_dir: Path, number: int) -> Lease:
    """Return the lease that the launcher of this process holds.

    Raises:
        OwnershipError: the launcher has already lost it.
    """
    record = read_attempt(attempt_path(run_dir, number))
    if record is None or record.ended:
        raise OwnershipError(
            f"{run_dir} is no longer owned by attempt {number}; start the run again"
        )
    return Lease(run_dir, number, record.process)


def require_free(run_dir: Path, *, say: Say) -> None:
    """Check that no living run owns a directory, before it is removed.

    Raises:
        OwnershipError: one does.
    """
    with one_line_errors(run_dir):
        _await_free(run_dir, this_process(), say, EXPIRY_SECONDS)


def _await_free(run_dir: Path, process: Process, say: Say, expiry_seconds: float) -> int:
    """Return the newest attempt's number, or 0, once it is certain that it does not own the
    directory."""
    number = newest_attempt(run_dir)
    path = attempt_path(run_dir, number)
    record = read_attempt(path)
    if record is None or record.ended:
        return number
    if record.process.is_local_to(process):
        is_alive = record.process.is_running()
    else:
        say(
            f"{run_dir} is held by {record.describe()}; watching it for up to "
            f"{expiry_seconds:.0f} s to see whether it is alive"
        )
        is_alive = _beats(path, expiry_seconds)
    if is_alive:
        # A file that was read while it was being written now names its owner.
        record, trace = read_attempt(path) or record, trace_of(path)
        seen = f", last heartbeat {utc_text(trace[0] / 1e9)}" if trace else ""
        raise OwnershipError(
            f"run.dir={run_dir} is owned by {record.describe()} (attempt {number}{seen}); "
            "stop that run or use another run.dir"
        )
    return number


def _beats(path: Path, seconds: float) -> bool:
    """Return whether the file changes within the time."""
    first, deadline = trace_of(path), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(_POLL_SECONDS, seconds / 10))
        if trace_of(path) != first:
            return True
    return False


def _close_books(run_dir: Path, number: int, successor: int) -> None:
    """Record in a dead owner's file which attempt took over, for the case that it is still
    alive."""
    path = attempt_path(run_dir, number)
    record = read_attempt(path)
    if record is not None and not record.ended:
        ended = f"taken over by attempt {successor}"
        with suppress(Phi4Error):
            replace_attempt(path, msgspec.structs.replace(record, ended=ended))


def _beat(lease: Lease, stopping: threading.Event) -> None:
    while not stopping.wait(HEARTBEAT_SECONDS):
        # A temporary failure of the file system is retried; `check` detects a lost lease.
        with suppress(OSError):
            lease.touch()
