"""One start of `phi4 train` as a user makes it, watched from outside.

What it does is told by its run directory and its output; nothing in it knows that it is watched.
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
    """One start of `phi4 train` and what can be seen of it.

    Args:
        process: its launcher.
        run_dir: its run directory.
        log: takes its output.
        log_start: where its output begins there, in bytes.
        num_before: number of the attempt before it.
        num_ranks: of its layout.
        deadline: of the monotonic clock; waiting longer raises.
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
        """Of the launcher."""
        return self._process.pid

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Wait for an event; False when the run ended before it.

        Raises:
            WorkerError: it took too long.
        """
        while not happened():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > self._deadline:
                raise WorkerError(f"a run does not go on and was killed; its output: {self.log}")
            time.sleep(_POLL_SECONDS)
        return True

    def has_begun(self) -> bool:
        """Whether it owns the run directory."""
        return newest_attempt(self._run_dir) > self._num_before

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(checkpoints_dir(self._run_dir).glob(".step_*.partial"))

    def has_recorded(self, num_steps: int) -> bool:
        """Whether so many steps of this attempt are in the record."""
        return recorded_step(self._run_dir) >= self.first_step + num_steps

    def await_ranks(self) -> list[int]:
        """Pids of the ranks, by rank, once there are all; empty when the run ended before.

        The launcher where it is the only process.
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
        """Send a signal to processes that may just have ended."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def output(self) -> str:
        """What it wrote."""
        with self.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._log_start)
            return log.read()

    def end(self) -> int:
        """Exit code, once it ended; 128 + S for one that died of signal S.

        Raises:
            WorkerError: it took too long.
        """
        self.wait_until(lambda: False)
        code = self._process.returncode
        return code if code >= 0 else 128 - code


@contextmanager
def started(recipe_path: Path, recipe: Recipe, seconds: float) -> Iterator[WatchedRun]:
    """Start a recipe; whatever is left of it at the end of the block is killed.

    Args:
        recipe_path: its file; the output goes beside it.
        recipe: what the file holds.
        seconds: bound of every wait.
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
    """Steps in the record whose line is complete; 0 without one."""
    with suppress(FileNotFoundError):
        return (run_dir / METRICS_FILE).read_bytes().count(b"\n")
    return 0


def saved_steps(run_dir: Path) -> set[int]:
    """Steps of the complete checkpoints."""
    return {step_of(path) for path in complete_checkpoints(checkpoints_dir(run_dir))}
