"""Worker processes for math-verify, killed and replaced on timeout.

The limits are our own: memory and processor time inside the worker, wall time outside. A killed
worker's question has no answer, and the next question gets a new worker.
"""

import json
import os
import queue
import select
import subprocess
import sys
import time
from contextlib import suppress

from phi4.oracles.verdict import Grade

PROGRAM = "from phi4.oracles.math.verify_worker import main\nmain()\n"

WALL_SECONDS = 600.0
"""Wall time limit of one question. The processor time limit is usually reached first, unless the
machine is very busy."""


class VerifyWorkers:
    """Up to `num_workers` processes, started on demand.

    `ask` may be called by that many threads at once.

    Args:
        num_workers: at least 1.
        wall_seconds: limit of one question.
        program: Python statements that a worker runs; they reply to a line of JSON with another.
    """

    def __init__(
        self, num_workers: int, wall_seconds: float = WALL_SECONDS, program: str = PROGRAM
    ) -> None:
        self._wall_seconds = wall_seconds
        self._program = program
        self._idle: queue.SimpleQueue[_VerifyWorker | None] = queue.SimpleQueue()
        self._num_workers = num_workers
        for _ in range(num_workers):
            self._idle.put(None)

    def ask(self, key: str, answer: str) -> tuple[Grade, str]:
        """Return the result of `verify_worker.judge`; ungradable if it did not finish."""
        worker = self._idle.get()
        try:
            worker = worker or _VerifyWorker(self._program)
            told = worker.ask(key, answer, self._wall_seconds)
            if told is None:
                worker.kill()
                worker = None
                return Grade.UNGRADABLE, "math-verify ran out of time or memory"
            return Grade(told[0]), told[1]
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; a later question starts new ones."""
        for _ in range(self._num_workers):
            worker = self._idle.get()
            if worker is not None:
                worker.kill()
            self._idle.put(None)


class _VerifyWorker:
    """One process."""

    def __init__(self, program: str) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}\n{program}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def ask(self, key: str, answer: str, wall_seconds: float) -> tuple[str, str] | None:
        """Return its answer, or None on timeout."""
        question = json.dumps([key, answer]) + "\n"
        try:
            self._stdin.write(question.encode())
            self._stdin.flush()
        except OSError:
            return None
        line = self._line(time.monotonic() + wall_seconds)
        if line is None:
            return None
        verdict, reason = json.loads(line)
        return verdict, reason

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._stdin, self._stdout):
            with suppress(OSError):
                pipe.close()

    def _line(self, deadline: float) -> bytes | None:
        fd, line = self._stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(fd, 1 << 16) if ready else b""
            if not data:
                return None
            line += data
        return line
