"""Notices: SIGTERM and SIGUSR1, by which a cluster asks a run to save its step and end.

A server ends likewise: what it is asked already is answered first. `StopPlan` says which it is.

One decision: both signals are blocked in every thread, and one thread takes them. So they are kept
from the first moment of a process on, whatever it is doing; a rank that waits in a collective sees
them; no system call is interrupted; and the processes that a rank starts, which inherit the mask,
neither die of them nor act on them: Slurm sends a signal to every process of a step. Such a process
ends by a message or by SIGKILL, `Process.terminate` does not reach it.
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
"""A SIGTERM so long after the first is a second one: a batch script that passes it on and Slurm,
which sends it to every process, mean the same one."""


@dataclass(frozen=True)
class StopPlan:
    """What a command does from a notice on, and what it says.

    Attributes:
        seconds: what it has from the first notice on to end by itself; then it is killed.
        first: said at the notice.
        overdue: said where it did not end in time.
        second: said at a second signal, which ends it at once.
        by_ctrl_c: whether Ctrl-C is a notice as well; otherwise it ends the command at once.
    """

    seconds: float
    first: str
    overdue: str
    second: str
    by_ctrl_c: bool = False


def save_and_end(seconds: float) -> StopPlan:
    """The plan of a training.

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
    """Let notices wait until they are taken, here and in what this process starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)


def take_notices(plan: StopPlan | None, *, ends_at_second: bool = False) -> threading.Event:
    """An event that is set once a notice arrived; for the time of the process. Main thread only.

    Args:
        plan: a process that has not ended in its time leaves with 143. None where its launcher
            sees to that, and to Ctrl-C.
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
    """A notice on its way through the launcher to the workers, and what is left of their time.

    Args:
        plan: of the workers; their time runs from the first signal on, or from the first of them
            that ended because it was told to.
    """

    def __init__(self, plan: StopPlan) -> None:
        self._plan = plan
        self._number: int | None = None
        self._first_term: float | None = None
        self._since: float | None = None
        self._is_passed_on = False

    def takes(self, number: int) -> bool:
        """Whether a signal is a notice."""
        return number in NOTICES or (self._plan.by_ctrl_c and number == signal.SIGINT)

    def arrived(self, number: int) -> bool:
        """Note a signal; whether it is a second SIGTERM or Ctrl-C, which ends the run at once."""
        now, is_first = time.monotonic(), self._number is None
        self._number = self._number or number
        if number == signal.SIGINT:
            return not is_first
        if number != signal.SIGTERM:
            return False
        self._first_term = self._first_term or now
        return now - self._first_term > SECOND_SECONDS

    def pass_on(self, workers: Sequence[subprocess.Popen]) -> str:
        """Tell the workers, once; gives a line to say then, else nothing."""
        if self._number is None or self._is_passed_on:
            return ""
        self._is_passed_on = True
        self.begin()
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        return f"{signal.Signals(self._number).name}: {self._plan.first}"

    def begin(self) -> None:
        """The workers' time runs from now on, unless it does already."""
        self._since = self._since or time.monotonic()

    def overdue(self) -> int | None:
        """The signal that ends the run when the workers' time is over."""
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
