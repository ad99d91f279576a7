"""Writer processes that fork off a rank: that saves 2 CPU seconds of an interpreter with torch.

What they do is the product's; a test may spoil it first, in that process alone.
"""

import os
from collections.abc import Callable

from phi4.writer import Staging, WriterProcess
from phi4.writer.process import serve


class Forked:
    """A handle as `subprocess.Popen` is one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if found else None
        return self._code

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, 9)


def start_forked(spoil: Callable[[], None], control_fd: int, memory_fd: int) -> Forked:
    """Fork a writer in which `spoil` was called first."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return Forked(pid)
    try:
        spoil()
        serve(control_fd, memory_fd, parent)
    finally:
        os._exit(0)


def forked_writer(staging: Staging, spoil: Callable[[], None] = lambda: None) -> WriterProcess:
    """A writer whose processes fork; the first one is spoilt."""
    spoils = iter([spoil])
    return WriterProcess(
        staging,
        lambda control, memory: start_forked(next(spoils, lambda: None), control, memory),
    )
