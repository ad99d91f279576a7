"""Track a training run in MLflow through a separate process that reads the record and sends it.

Training does nothing for MLflow except start that process and report how the run ended. Everything
that the process sends is in metrics.jsonl, so its death loses nothing.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os import getpid
from pathlib import Path
from typing import IO, Any

import msgspec

from phi4.rundir.attempts import newest_attempt
from phi4.track.mlflow.messages import (
    Arrived,
    FollowRun,
    FromFollower,
    StatusSet,
    Told,
    TrainingEnded,
)
from phi4.track.mlflow.wish import TrackingWish
from phi4.track.record import Status

PATIENCE_SECONDS = 30.0
"""How long the end of a run waits for points that have not arrived yet."""

_HASTY_SECONDS = 5.0
"""The same for a run that was told to end: a cluster kills it soon, by default after 30 s."""

_COMMAND = (sys.executable, "-m", "phi4.track.mlflow.process")
_HELD_BACK = {
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
}
"""Signals that ask a run to end, or that Slurm sends to every process of it: the follower ends
later."""


class MlflowTracker:
    """Tracks a run in MLflow, in the same MLflow run across restarts; a `Tracker`.

    Args:
        wish: where the run is tracked.
        say: prints a line for the user; called from a thread.
        patience_seconds: how long `finish` waits.
        command: the command to start; a parameter for tests.
    """

    def __init__(
        self,
        wish: TrackingWish,
        say: Callable[[str], None],
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        self._wish, self._say = wish, say
        self._patience_seconds, self._command = patience_seconds, command
        self._last_step = self._arrived = 0
        self._is_complete = self._is_ending = False
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = threading.Thread(target=self._read, name="mlflow", daemon=True)

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """Start the process, which reads the recipe from the run's directory."""
        # The process inherits the signal mask of the thread that starts it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        attempt = newest_attempt(Path(self._wish.run_dir))
        self._write(FollowRun(self._wish, attempt, getpid()))
        self._reader.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the step; the process reads the line from the record."""
        self._last_step = step

    def rewind(self, step: int) -> None:
        """Do nothing: the process detects that the record was cut."""
        self._last_step = step

    def finish(self, status: Status) -> None:
        """Report how the run ended, and wait until MLflow has everything, at most for the
        patience."""
        if self._process is None:
            return
        self._is_ending = True
        self._write(TrainingEnded(status))
        longest = _HASTY_SECONDS if status == "interrupted" else self._patience_seconds
        self._reader.join(min(longest, self._patience_seconds))
        if not self._is_complete:
            self._process.kill()
            self._reader.join()
            self._say(
                f"MLflow has {self._arrived} of {self._last_step} steps; metrics.jsonl has all of "
                f"them, and `phi4 track replay {self._wish.run_dir}` sends the rest"
                if self._arrived < self._last_step
                else (
                    "MLflow has all steps but not the run's final status; `phi4 track settle "
                    f"{self._wish.run_dir}` sets it"
                )
            )
        self._close()

    def _read(self) -> None:
        """Read the process's messages until it ends."""
        decoder = msgspec.json.Decoder(FromFollower)
        process, _, told = self._started()
        for line in told:
            match decoder.decode(line):
                case Told(text=text):
                    self._say(text)
                case Arrived(step=step):
                    self._arrived = step
                case StatusSet():
                    self._is_complete = True
        code = process.wait()
        if not self._is_ending:
            self._say(
                f"the process that fills MLflow ended with code {code} at step {self._arrived}; "
                f"training continues, `phi4 track replay {self._wish.run_dir}` sends the rest"
            )

    def _write(self, message: FollowRun | TrainingEnded) -> None:
        _, pipe, _ = self._started()
        # It may have died; the reader reports that.
        with suppress(BrokenPipeError):
            pipe.write(msgspec.json.encode(message) + b"\n")
            pipe.flush()

    def _close(self) -> None:
        _, pipe, told = self._started()
        with suppress(BrokenPipeError):
            pipe.close()
        told.close()

    def _started(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        """The process and its two pipes, once it was started."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        return process, process.stdin, process.stdout
