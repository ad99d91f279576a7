"""Kill all remaining processes of a run, even if the launcher itself was killed.

A process belongs to a run if its environment contains the run's directory, and to a sweep if it
contains the sweep's marker. This covers forks, spawned interpreters and new sessions, which a
process group does not. The launcher calls `sweep` when it ends a run; a second copy of this file,
run as a script next to the launcher, calls it when the launcher's end of a pipe closes. Standard
library only, so that it starts in milliseconds.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

MARK = "PHI4_RENDEZVOUS"


def processes_of(value: str, name: str = MARK) -> list[int]:
    """Return pids of living processes in whose environment a variable has this value."""
    mark = f"{name}={value}".encode()
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        # The process ended meanwhile, or belongs to another user: not one of ours.
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
            if mark in environ.read().split(b"\0"):
                found.append(int(name))
    return found


def sweep(value: str, timeout_seconds: float = 20.0, name: str = MARK) -> list[int]:
    """Kill the processes of the run until none is left.

    Args:
        value: the run's directory, or the value of the environment variable `name`.
        timeout_seconds: how long to try.
        name: name of the environment variable.

    Returns:
        Pids that are still alive at the timeout, stuck in the kernel.
    """
    deadline = time.monotonic() + timeout_seconds
    # A process may fork between the listing and the kill, hence the loop.
    while (alive := processes_of(value, name)) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return alive


def main(value: str, name: str = MARK) -> None:
    """Wait for the launcher to end, then kill what it left behind."""
    sys.stdin.buffer.read()
    sweep(value, name=name)
    # A worker that was between fork and exec had no marker yet.
    time.sleep(0.2)
    sweep(value, name=name)
    if name == MARK:
        shutil.rmtree(value, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
