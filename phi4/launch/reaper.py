"""Leaves no process of a run behind, not even when the launcher itself is killed.

A process belongs to a run when its environment names the run's directory. That mark follows forks,
spawned interpreters and new sessions, which a process group does not. The launcher calls `sweep`
when it ends a run; a second copy of this file, run as a script beside the launcher, calls it when
the launcher's end of a pipe closes. Standard library only, so that it starts in milliseconds.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

MARK = "PHI4_RENDEZVOUS"


def processes_of(run_dir: str) -> list[int]:
    """Living processes of the run, by pid."""
    mark = f"{MARK}={run_dir}".encode()
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        # Ends while it is read, or belongs to another user: not one of ours.
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
            if mark in environ.read().split(b"\0"):
                found.append(int(name))
    return found


def sweep(run_dir: str, timeout_seconds: float = 20.0) -> list[int]:
    """Kill the processes of the run until none is left.

    Returns:
        Pids that outlived the time, stuck in the kernel.
    """
    deadline = time.monotonic() + timeout_seconds
    # A process may fork between the look and the kill, hence the loop.
    while (alive := processes_of(run_dir)) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return alive


def main(run_dir: str) -> None:
    """Wait for the launcher to go, then remove what it left."""
    sys.stdin.buffer.read()
    sweep(run_dir)
    # A worker that was between fork and exec carried no mark yet.
    time.sleep(0.2)
    sweep(run_dir)
    shutil.rmtree(run_dir, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
