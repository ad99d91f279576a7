"""Notices: SIGTERM and SIGUSR1, with which a cluster asks a run to save its step and end.

A server ends in the same way, after answering open requests. `StopPlan` distinguishes the two.

Both signals are blocked in every thread, and one thread receives them. They are thus pending from
the start of a process, whatever it is doing; a rank that waits in a collective receives them; no
system call is interrupted; and child processes, which inherit the mask, neither die of them nor
handle them, although Slurm sends a signal to every process of a step. A child process is ended by a
message or by SIGKILL; `Process.terminate` has no effect on it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

NOTICES = frozenset({signal.SIGTERM, signal.SIGUSR1})

SECOND_SECONDS = 1.0
"""A SIGTERM this long after the first counts as a second one: the same notice may arrive twice,
from a batch script that forwards it and from Slurm, which sends it to every process."""


@dataclass(frozen=True)
class StopPlan:
    """What a command does after a notice, and the messages that it prints.

    Attributes:
        seconds: time from the first notice to end by itself; then it is killed.
        first: printed at the notice.
        overdue: printed if it did not end in time.
        second: printed at a second signal, which ends it at once.
        by_ctrl_c: whether Ctrl-C is a notice as well; otherwise it ends the command at once.
    """

    seconds: float
    first: str
    overdue: str
    second: str
    by_ctrl_c: bool = False


def save_and_end(seconds: float) -> StopPlan:
    """Return the stop plan of a training run.

    Args:
        seconds: `reliability.stop_seconds`.
    """
    limit = "reliability.stop_seconds"
    return StopPlan(
        seconds,
        first=f"the run saves its step and ends, within {seconds:g} s ({limit}); a second SIGTERM "
        "ends it at once",
        overdue=f"not ended within {limit}={seconds:g}; killed",
        second="ended without a save",
    )


def hold_notices() -> None:
    """Keep notices pending, here and in the processes that this one starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)


def take_notices(plan: StopPlan | None, *, ends_at_second: bool = False) -> threading.Event:
    """Return an event that is set once a notice has arrived, for the lifetime of the process. Main
    thread only.

    Args:
        plan: a process that has not ended in time exits with 143. None if its launcher handles
            that, and Ctrl-C.
        ends_at_second: whether a second SIGTERM ends the process at once, with 143; needs a plan.
    """
    hold_notices()
    noticed = threading.Event()
    options = (noticed, plan, ends_at_second)
    threading.Thread(target=_take, args=options, name="notices", daemon=True).start()
    if plan is not None and plan.by_ctrl_c:
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return noticed


class PassedOnNotice:
    """A notice that the launcher forwards to the workers, and the time they have left.

    Args:
        plan: plan of the workers; their time runs from the first signal, or from the first worker
            that ended because of a notice.
    """

    def __init__(self, plan: StopPlan) -> None:
        self._plan = plan
        self._number: int | None = None
        self._first_term: float | None = None
        self._since: float | None = None
        self._is_passed_on = False

    def takes(self, number: int) -> bool:
        """Return whether a signal is a notice."""
        return number in NOTICES or (self._plan.by_ctrl_c and number == signal.SIGINT)

    def arrived(self, number: int) -> bool:
        """Record a signal; return whether it is a second SIGTERM or Ctrl-C, which ends the run at
        once."""
        now, is_first = time.monotonic(), self._number is None
        self._number = self._number or number
        if number == signal.SIGINT:
            return not is_first
        if number != signal.SIGTERM:
            return False
        self._first_term = self._first_term or now
        return now - self._first_term > SECOND_SECONDS

    def pass_on(self, workers: Sequence[subprocess.Popen]) -> str:
        """Forward the notice to the workers, once; return a line to print, or nothing."""
        if self._number is None or self._is_passed_on:
            return ""
        self._is_passed_on = True
        self.begin()
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        return f"{signal.Signals(self._number).name}: {self._plan.first}"

    def begin(self) -> None:
        """Start the workers' time limit, unless it has been started."""
        self._since = self._since or time.monotonic()

    def overdue(self) -> int | None:
        """Return the signal that ends the run when the workers' time is over."""
        if self._since is None or time.monotonic() - self._since < self._plan.seconds:
            return None
        return self._number or signal.SIGTERM


def _take(noticed: threading.Event, plan: StopPlan | None, ends_at_second: bool) -> None:
    name = signal.Signals(signal.sigwait(NOTICES)).name
    since = time.monotonic()
    noticed.set()
    wanted = {signal.SIGTERM} if ends_at_second else set()
    while plan is not None:
        left = since + plan.seconds - time.monotonic()
        if left <= 0:
            _leave(f"{name}: {plan.overdue}")
        if signal.sigtimedwait(wanted, left) and time.monotonic() - since > SECOND_SECONDS:
            _leave(f"a second SIGTERM: {plan.second}")


def _leave(why: str) -> NoReturn:
    print(why, file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)
