"""Notices: SIGTERM and SIGUSR1, by which a cluster asks a run to save its step and end.

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
from typing import NoReturn

NOTICES = frozenset({signal.SIGTERM, signal.SIGUSR1})

SECOND_SECONDS = 1.0
"""A SIGTERM so long after the first is a second one: a batch script that passes it on and Slurm,
which sends it to every process, mean the same one."""


def hold_notices() -> None:
    """Let notices wait until they are taken, here and in what this process starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)


def take_notices(*, stop_seconds: float | None, ends_at_second: bool) -> threading.Event:
    """An event that is set once a notice arrived; for the time of the process.

    Args:
        stop_seconds: what the process has from the first notice on; then it leaves with 143. None
            where its launcher sees to that.
        ends_at_second: whether a second SIGTERM ends the process at once, with 143.
    """
    hold_notices()
    noticed = threading.Event()
    options = (noticed, stop_seconds, ends_at_second)
    threading.Thread(target=_take, args=options, name="notices", daemon=True).start()
    return noticed


class PassedOnNotice:
    """A notice on its way through the launcher to the workers, and what is left of their time.

    Args:
        stop_seconds: what they have from the first signal on, or from the first of them that ended
            because it was told to.
    """

    def __init__(self, stop_seconds: float) -> None:
        self._stop_seconds = stop_seconds
        self._number: int | None = None
        self._first_term: float | None = None
        self._since: float | None = None
        self._is_passed_on = False

    def arrived(self, number: int) -> bool:
        """Note a signal; whether it is a second SIGTERM, which ends the run at once."""
        now = time.monotonic()
        self._number = self._number or number
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
        return (
            f"{signal.Signals(self._number).name}: the run saves its step and ends, within "
            f"{self._stop_seconds:g} s (reliability.stop_seconds); a second SIGTERM ends it at once"
        )

    def begin(self) -> None:
        """The workers' time runs from now on, unless it does already."""
        self._since = self._since or time.monotonic()

    def overdue(self) -> int | None:
        """The signal that ends the run when the workers' time is over."""
        if self._since is None or time.monotonic() - self._since < self._stop_seconds:
            return None
        return self._number or signal.SIGTERM


def _take(noticed: threading.Event, stop_seconds: float | None, ends_at_second: bool) -> None:
    name = signal.Signals(signal.sigwait(NOTICES)).name
    since = time.monotonic()
    noticed.set()
    wanted = {signal.SIGTERM} if ends_at_second else set()
    while stop_seconds is not None or wanted:
        left = 3600.0 if stop_seconds is None else since + stop_seconds - time.monotonic()
        if left <= 0:
            _leave(f"{name}: not ended within reliability.stop_seconds={stop_seconds:g}; killed")
        if signal.sigtimedwait(wanted, left) and time.monotonic() - since > SECOND_SECONDS:
            _leave("a second SIGTERM: ended without a save")


def _leave(why: str) -> NoReturn:
    print(why, file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)
