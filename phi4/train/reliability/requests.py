"""What is asked of a run from outside: to end after a notice, to end for good, to save now.

A rank's own flags come from signals and, on the writer rank, from files that a user creates in the
run directory. What counts is what the ranks agreed on, in the reduction that ends every step and
every evaluation batch anyway: all of them learn it at the same place.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from phi4.engine.agreement import Asked, asked_of_any
from phi4.engine.platform import Platform
from phi4.engine.step import StepResult
from phi4.errors import REQUEUE_EXIT_CODE
from phi4.rundir.names import SAVE_NOW_FILE, STOP_FILE

LOOK_SECONDS = 1.0
"""Between two looks at the run directory."""

TORCHRUN_SECONDS = 30.0
"""torchrun kills its workers so long after it passed on a SIGTERM."""

_MARGIN_SECONDS = 5.0


class Stop(NamedTuple):
    """Why a run ends before its last step, and with which code."""

    reason: str
    exit_code: int


class Requests:
    """What is asked of this rank, and what all ranks agreed on.

    Args:
        noticed: set once a notice arrived at this rank; by another thread.
        kill_seconds: what is left after a notice, where that is not the recipe's to say; then the
            process is killed.
        was_preempted: asked once a notice ended the run: whether the cluster starts it again; None
            where it is unknown.

    Attributes:
        agreed: on every rank the same; changed by `learn`, `agree` and `saved`.
        save_progress: gives what `asked` tells of the save under way: (busy, failed).
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
        """What is asked of this rank at present; cheap."""
        files = self._files
        from_outside = self._noticed.is_set(), STOP_FILE in files, SAVE_NOW_FILE in files
        return Asked(*from_outside, *self.save_progress())

    def learn(self, result: StepResult) -> bool:
        """Take over what the ranks agreed on in a step; whether the run is to end."""
        before, told = self.agreed, result.asked
        self.agreed = told._replace(
            requeue=before.requeue or told.requeue,
            end=before.end or told.end,
            save=before.save or told.save,
        )
        return self.agreed.stops

    def agree(self, platform: Platform) -> bool:
        """Ask all ranks, where no step does it; whether the run is to end.

        Collectives: those of `asked_of_any`.
        """
        self.agreed = asked_of_any(platform, self.asked())
        return self.agreed.stops

    def stop(self) -> Stop | None:
        """What follows from what was agreed on; None to continue."""
        if self.agreed.end:
            return Stop(f"asked for by the file {STOP_FILE}, which is removed now", 0)
        if self.agreed.requeue:
            return Stop("stopped by a signal", REQUEUE_EXIT_CODE)
        return None

    def saved(self) -> None:
        """A save was made or tried: the request for one is answered, on every rank."""
        self.agreed = self.agreed._replace(save=False)
        self._forget(SAVE_NOW_FILE)

    def ended(self) -> None:
        """The run ends as it was asked to."""
        self._forget(STOP_FILE)
        self._forget(SAVE_NOW_FILE)

    @contextmanager
    def watching(self, run_dir: Path, *, is_writer: bool) -> Iterator[None]:
        """Look for files in the run directory for the time of the block, on the writer rank.

        A thread does it: a file system that does not answer must not stop the training.
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
        """Say once when a step and a save take longer than is left after a notice."""
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
            # A listing asks the server; whether one file exists, NFS answers from its cache.
            self._files = frozenset(
                {STOP_FILE, SAVE_NOW_FILE}.intersection(os.listdir(self._run_dir))
            )

    def _forget(self, name: str) -> None:
        if self._run_dir is None or name not in self._files:
            return
        # Under the lock, or a look that began before would bring it back.
        with self._lock, suppress(OSError):
            (self._run_dir / name).unlink(missing_ok=True)
            self._files -= {name}
