"""Start `phi4 train` as a user does, and watch it from outside.

Its state is read from its run directory and its output; the run itself is unmodified.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from phi4.config import Recipe
from phi4.errors import WorkerError
from phi4.rundir.attempts import newest_attempt
from phi4.rundir.checkpoints import checkpoints_dir, complete_checkpoints, step_of
from phi4.rundir.names import METRICS_FILE

_POLL_SECONDS = 0.005


class WatchedRun:
    """A start of `phi4 train` and its observable state.

    Args:
        process: its launcher.
        run_dir: its run directory.
        log: file of its output.
        log_start: offset in bytes where its output begins.
        num_before: number of the attempt before it.
        num_ranks: number of ranks of its layout.
        deadline: time of the monotonic clock after which waiting raises an error.
    """

    def __init__(
        self,
        process: subprocess.Popen,
        run_dir: Path,
        log: Path,
        *,
        log_start: int,
        num_before: int,
        num_ranks: int,
        deadline: float,
    ) -> None:
        self._process = process
        self._run_dir = run_dir
        self._num_ranks = num_ranks
        self._deadline = deadline
        self._num_before = num_before
        self._log_start = log_start
        self.log = log
        self.first_step = recorded_step(run_dir)

    @property
    def pid(self) -> int:
        """Pid of the launcher."""
        return self._process.pid

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Wait for an event; return False if the run ended before it.

        Raises:
            WorkerError: it took too long.
        """
        while not happened():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > self._deadline:
                raise WorkerError(f"a run made no progress and was killed; its output: {self.log}")
            time.sleep(_POLL_SECONDS)
        return True

    def has_begun(self) -> bool:
        """Return whether it owns the run directory."""
        return newest_attempt(self._run_dir) > self._num_before

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        return any(checkpoints_dir(self._run_dir).glob(".step_*.partial"))

    def has_recorded(self, num_steps: int) -> bool:
        """Return whether this many steps of the attempt are in the record."""
        return recorded_step(self._run_dir) >= self.first_step + num_steps

    def await_ranks(self) -> list[int]:
        """Return pids of the ranks, by rank, once all have started; empty if the run ended before.

        The launcher's pid if it is the only process.
        """
        if self._num_ranks == 1:
            return [self.pid]
        found: dict[int, int] = {}

        def are_there() -> bool:
            with suppress(psutil.Error):
                for child in psutil.Process(self.pid).children():
                    if (rank := child.environ().get("RANK")) is not None:
                        found[int(rank)] = child.pid
            return len(found) == self._num_ranks

        return [found[rank] for rank in sorted(found)] if self.wait_until(are_there) else []

    def send(self, number: int, pids: list[int]) -> None:
        """Send a signal to processes, some of which may just have ended."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def output(self) -> str:
        """Return its output."""
        with self.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_start)
            return log.read()

    def end(self) -> int:
        """Return the exit code, once it ended; 128 + S if it died of signal S.

        Raises:
            WorkerError: it took too long.
        """
        self.wait_until(lambda: False)
        code = self._process.returncode
        return code if code >= 0 else 128 - code


@contextmanager
def started(recipe_path: Path, recipe: Recipe, seconds: float) -> Iterator[WatchedRun]:
    """Start a recipe; all remaining processes are killed at the end of the block.

    Args:
        recipe_path: its file; the output is written next to it.
        recipe: content of the file.
        seconds: time limit of every wait.
    """
    run_dir, log = Path(recipe.run.dir), recipe_path.with_suffix(".log")
    num_ranks = recipe.parallel.model_parallel_size * max(recipe.parallel.data, 1)
    command = [sys.executable, "-m", "phi4", "train", str(recipe_path)]
    deadline = time.monotonic() + seconds
    num_before = newest_attempt(run_dir)
    with log.open("ab") as output:
        log_start = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    attempt = WatchedRun(
        process,
        run_dir,
        log,
        log_start=log_start,
        num_before=num_before,
        num_ranks=num_ranks,
        deadline=deadline,
    )
    try:
        yield attempt
    finally:
        process.kill()
        process.wait()


def recorded_step(run_dir: Path) -> int:
    """Return the number of recorded steps with a complete line."""
    with suppress(FileNotFoundError):
        return (run_dir / METRICS_FILE).read_bytes().count(b"\n")
    return 0


def saved_steps(run_dir: Path) -> set[int]:
    """Return the steps of the complete checkpoints."""
    return {step_of(path) for path in complete_checkpoints(checkpoints_dir(run_dir))}
