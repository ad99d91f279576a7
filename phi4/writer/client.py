"""A rank's interface to its writer process: submits tasks and polls for replies, without
blocking."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Protocol

from phi4.writer.messages import Failed, Reply, Task
from phi4.writer.process import FRAME, write_all
from phi4.writer.staging import Staging

_EXIT_POLLS, _EXIT_POLL_SECONDS = 100, 0.01


class Handle(Protocol):
    """A started process; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """Kill it."""


def start_interpreter(control_fd: int, memory_fd: int, first: str = "") -> Handle:
    """Start an interpreter that serves the two descriptors and inherits no other.

    Args:
        control_fd, memory_fd: see `phi4.writer.process.serve`.
        first: statements that it runs before; measurements use it to slow down the disk.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n{first}\n"
        "from phi4.imports import without_collections\n"
        "with without_collections():\n"
        "    from phi4.writer.process import serve\n"
        f"serve({control_fd}, {memory_fd}, {os.getpid()})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=(control_fd, memory_fd)
    )


class WriterProcess:
    """Starts a writer if there is none, and replaces one that ended.

    Args:
        staging: the shared memory.
        start: starts the process; tests substitute another one.
    """

    def __init__(
        self, staging: Staging, start: Callable[[int, int], Handle] = start_interpreter
    ) -> None:
        self.staging = staging
        self._start = start
        self._handle: Handle | None = None
        self._control: socket.socket | None = None
        self._is_busy = False

    @property
    def pid(self) -> int | None:
        """Pid of the process, if one was started."""
        return None if self._handle is None else self._handle.pid

    def prepare(self) -> None:
        """Start the process in advance, so that the first save does not wait for it.

        Raises:
            OSError: the process cannot be started.
        """
        if self._handle is not None and self._handle.poll() is None:
            return
        self.kill()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            self._handle = self._start(theirs.fileno(), self.staging.fd)
        self._control = ours

    def submit(self, task: Task) -> None:
        """Submit a task; `reply` returns its outcome.

        Raises:
            OSError: no process can be started.
        """
        self.prepare()
        content, offset = pickle.dumps(task), self.staging.capacity
        write_all(self.staging.fd, content, offset)
        self._is_busy = True
        assert self._control is not None
        # A process that ended meanwhile is detected by `reply`.
        with contextlib.suppress(OSError):
            self._control.send(FRAME.pack(offset, len(content)))

    def reply(self) -> Reply | None:
        """Return the outcome of the task, once; None while it is in progress."""
        if not self._is_busy:
            return None
        assert self._handle is not None and self._control is not None
        # Checked first: a reply that a process sent before it ended counts.
        code = self._handle.poll()
        frame = b""
        try:
            frame = self._control.recv(FRAME.size)
        except BlockingIOError:
            if code is None:
                return None
        except OSError:
            pass
        self._is_busy = False
        if frame:
            offset, length = FRAME.unpack(frame)
            return pickle.loads(os.pread(self.staging.fd, length, offset))
        return Failed(f"its writer process {self._handle.pid} {_end(self._handle)}")

    def cancel(self) -> None:
        """Abort the current task by killing the process."""
        if self._is_busy:
            self.kill()

    def kill(self) -> None:
        """Kill the process without waiting for it: one that hangs in the kernel ends later."""
        self._is_busy = False
        if self._handle is not None and self._handle.poll() is None:
            self._handle.kill()
        if self._control is not None:
            self._control.close()
        self._handle = self._control = None

    def close(self) -> None:
        """End the process and free the shared memory."""
        self.kill()
        self.staging.close()


def _end(handle: Handle) -> str:
    # Its socket closes shortly before its exit code is available.
    for _ in range(_EXIT_POLLS):
        if (code := handle.poll()) is not None:
            return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        time.sleep(_EXIT_POLL_SECONDS)
    return "closed its socket"
