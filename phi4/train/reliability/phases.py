"""The phase of the run that this rank is in, set by the training thread, read by the watchdog.

Every second belongs to one phase, and `taken` returns the seconds of each: the wall time of a run
is counted here. A change costs a few attribute writes and a tick one, so that a tick per
micro-batch is cheap.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of the run.

    Attributes:
        name: start, qualify, load, data, step, hooks (between steps), evaluate, fp8_check, save,
            roll_back or end.
        step: completed steps of the run.
        since: when it began, seconds of the monotonic clock.
    """

    name: str
    step: int
    since: float


class Phases:
    """The present phase of this rank and how often it made progress within it."""

    def __init__(self) -> None:
        self.current = Phase("start", 0, time.monotonic())
        self._seconds: dict[str, float] = {}
        self._counted_until = self.current.since
        self.ticks = 0
        """Counts every sign of progress of the training thread: phases, steps, micro-batches."""

    @contextmanager
    def during(self, name: str, step: int) -> Iterator[None]:
        """Enter a phase for the duration of the block, then return to the previous one."""
        before = self.current
        self._enter(name, step)
        try:
            yield
        finally:
            self._enter(before.name, step)

    def tick(self) -> None:
        """The training thread makes progress, for example with another micro-batch."""
        self.ticks += 1

    def taken(self) -> dict[str, float]:
        """Seconds of every phase since the last call; they sum to the time since then."""
        self._count(time.monotonic())
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _enter(self, name: str, step: int) -> None:
        now = time.monotonic()
        self._count(now)
        self.ticks += 1
        self.current = Phase(name, step, now)

    def _count(self, now: float) -> None:
        name = self.current.name
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._counted_until
        self._counted_until = now
