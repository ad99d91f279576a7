"""When a line of the record was written, by which attempt, and where the time went until then."""

import time

from phi4.rundir.goodput import SECONDS, goodput_of
from phi4.rundir.run_record import RunRecord
from phi4.train.reliability.phases import Phases

_BUCKETS = {
    "start": "start",
    "qualify": "start",
    "load": "load",
    "data": "data",
    "step": "step",
    "evaluate": "evaluation",
    "save": "save",
    "roll_back": "roll_back",
}
"""Phase -> bucket; every other phase is in `other`."""


class WallClock:
    """Counts the wall time of an attempt, on the writer rank.

    Args:
        phases: counts the seconds of this process.
        attempt: number of the attempt.
        started_unix: when it began, its launcher included; seconds since the epoch.
    """

    def __init__(self, phases: Phases, attempt: int, started_unix: float) -> None:
        self._phases = phases
        self._attempt = attempt
        self._started_unix = started_unix
        self._is_first = True
        self._began_unix = started_unix
        self._step_seconds = 0.0

    def follow(self, record: RunRecord) -> None:
        """Take over the times of earlier steps from those lines of the record that are valid."""
        goodput = goodput_of(record)
        self._began_unix = goodput.began_unix or self._started_unix
        self._step_seconds = goodput.seconds["step"]

    def numbers(self) -> dict[str, float]:
        """The times in a line: unix_seconds, attempt, goodput and seconds/BUCKET."""
        now, seconds = time.time(), self.taken()
        self._step_seconds += seconds.get("step", 0.0)
        return {
            "unix_seconds": now,
            "attempt": self._attempt,
            "goodput": self._step_seconds / max(now - self._began_unix, 1e-9),
            **{SECONDS + bucket: value for bucket, value in seconds.items()},
        }

    def taken(self) -> dict[str, float]:
        """Seconds by bucket since the last call, or since the attempt began."""
        seconds: dict[str, float] = {}
        for phase, value in self._phases.taken().items():
            bucket = _BUCKETS.get(phase, "other")
            seconds[bucket] = seconds.get(bucket, 0.0) + value
        if self._is_first:
            self._is_first = False
            # The launcher's time; or, if a rank took the lease itself, the time before that.
            before = time.time() - self._started_unix - sum(seconds.values())
            seconds["start"] = max(0.0, seconds.get("start", 0.0) + before)
        return {bucket: value for bucket, value in seconds.items() if value}
