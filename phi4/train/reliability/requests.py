"""Requests to a run from outside: to stop after a notice, to stop for good, to save now.

A rank's own flags come from signals and, on the writer rank, from files that a user creates in the
run directory. Only requests that the ranks agreed on take effect. They agree in the reduction that
ends every step and every evaluation batch anyway, so all of them know at the same point.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from phi4.engine.agreement import Asked, asked_of_any
from phi4.engine.platform import Platform
from phi4.engine.step_values import StepResult
from phi4.errors import REQUEUE_EXIT_CODE
from phi4.rundir.names import SAVE_NOW_FILE, STOP_FILE

LOOK_SECONDS = 1.0
"""Interval between two listings of the run directory."""

TORCHRUN_SECONDS = 30.0
"""Time from the SIGTERM that torchrun forwards to its workers until it kills them."""

_MARGIN_SECONDS = 5.0


class Stop(NamedTuple):
    """Why a run ends before its last step, and with which code."""

    reason: str
    exit_code: int


class Requests:
    """Requests made to this rank, and those that all ranks agreed on.

    Args:
        noticed: set by another thread once a notice has arrived at this rank.
        kill_seconds: time from a notice until the process is killed, if the recipe does not
            determine it.
        was_preempted: called once a notice has ended the run; returns whether the cluster starts it
            again, None if that is unknown.

    Attributes:
        agreed: the same on every rank; changed by `learn`, `agree` and `saved`.
        save_progress: returns the state of the save in progress for `asked`: (busy, failed).
    """

    def __init__(
        self,
        noticed: threading.Event | None = None,
        *,
        kill_seconds: float | None = None,
        was_preempted: Callable[[], bool | None] = lambda: None,
    ) -> None:
        self._noticed = noticed or threading.Event()
        self._kill_seconds = kill_seconds
        self.was_preempted = was_preempted
        self._run_dir: Path | None = None
        self._files = frozenset[str]()
        self._lock = threading.Lock()
        self.agreed = Asked()
        self.save_progress: Callable[[], tuple[bool, bool]] = lambda: (False, False)

    def asked(self) -> Asked:
        """The present requests to this rank; cheap."""
        files = self._files
        from_outside = self._noticed.is_set(), STOP_FILE in files, SAVE_NOW_FILE in files
        return Asked(*from_outside, *self.save_progress())

    def learn(self, result: StepResult) -> bool:
        """Take over what the ranks agreed on in a step; returns whether the run is to stop."""
        before, told = self.agreed, result.asked
        self.agreed = told._replace(
            requeue=before.requeue or told.requeue,
            end=before.end or told.end,
            save=before.save or told.save,
        )
        return self.agreed.stops

    def agree(self, platform: Platform) -> bool:
        """Agree outside of a step; returns whether the run is to stop.

        Collectives: those of `asked_of_any`.
        """
        self.agreed = asked_of_any(platform, self.asked())
        return self.agreed.stops

    def stop(self) -> Stop | None:
        """The stop that the ranks agreed on; None to continue."""
        if self.agreed.end:
            return Stop(f"asked for by the file {STOP_FILE}, which is removed now", 0)
        if self.agreed.requeue:
            return Stop("stopped by a signal", REQUEUE_EXIT_CODE)
        return None

    def saved(self) -> None:
        """A save was made or tried: clear the request for one, on every rank."""
        self.agreed = self.agreed._replace(save=False)
        self._forget(SAVE_NOW_FILE)

    def ended(self) -> None:
        """The run ends as requested: remove the files of the requests."""
        self._forget(STOP_FILE)
        self._forget(SAVE_NOW_FILE)

    @contextmanager
    def watching(self, run_dir: Path, *, is_writer: bool) -> Iterator[None]:
        """Watch for files in the run directory for the duration of the block, on the writer rank.

        It is done in a thread: a file system that does not answer must not stop the training.
        """
        if not is_writer:
            yield
            return
        self._run_dir = run_dir
        self._look()
        closing = threading.Event()
        watch = threading.Thread(target=self._watch, args=(closing,), name="requests", daemon=True)
        watch.start()
        try:
            yield
        finally:
            # Not joined: it may hang in the file system.
            closing.set()

    def warn_of_slow_saves(
        self, step_seconds: float, save_seconds: float, say: Callable[[str], None]
    ) -> None:
        """Warn once if a step and a save take longer than the time that is left after a notice."""
        limit = self._kill_seconds
        if limit is None or step_seconds + save_seconds <= limit - _MARGIN_SECONDS:
            return
        self._kill_seconds = None
        say(
            f"a step takes {step_seconds:.1f} s and a save {save_seconds:.1f} s, but torchrun "
            f"kills its workers {limit:.0f} s after a SIGTERM, so a preempted run may lose what it "
            "did since its last save; start one rank per GPU by srun, or lower checkpoint.every"
        )

    def _watch(self, closing: threading.Event) -> None:
        while not closing.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        assert self._run_dir is not None
        with self._lock, suppress(OSError):
            # A listing queries the server; NFS answers an existence check from its cache.
            self._files = frozenset(
                {STOP_FILE, SAVE_NOW_FILE}.intersection(os.listdir(self._run_dir))
            )

    def _forget(self, name: str) -> None:
        if self._run_dir is None or name not in self._files:
            return
        # Locked, because a listing that began earlier would bring the name back.
        with self._lock, suppress(OSError):
            (self._run_dir / name).unlink(missing_ok=True)
            self._files -= {name}
