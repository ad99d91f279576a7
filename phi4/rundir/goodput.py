"""Account for a run's wall time over all its attempts, by bucket.

A line of metrics.jsonl holds the seconds of rank 0 since the line before it, by bucket
(`seconds/BUCKET`); an attempt's file holds the seconds before its first and after its last line.
Time spent on steps that a rollback undid counts as roll_back, and on those that a kill undid as
restart, whatever the bucket was: that work was done again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4.rundir.attempts import Attempt
from phi4.rundir.run_record import RunRecord

SECONDS = "seconds/"
"""Prefix of a bucket's key in a line."""

BUCKETS = ("step", "data", "evaluation", "save", "start", "restart", "roll_back", "other")
"""start: until the first attempt's first step. restart: between attempts, until a later attempt's
first step, and steps repeated after a kill. other: hooks, records, the end."""

_STARTING = ("start", "load")


@dataclass(frozen=True)
class Goodput:
    """Wall time of a run from its first start to its last recorded activity.

    Attributes:
        seconds: by bucket of `BUCKETS`, including those with 0.
        began_unix: first start, seconds since the epoch; 0 if not recorded.
        ended_unix: end of the newest attempt, or its last line.
    """

    seconds: Mapping[str, float]
    began_unix: float
    ended_unix: float

    @property
    def wall_seconds(self) -> float:
        """Elapsed wall-clock time; the buckets are measured with another clock and sum to it."""
        return self.ended_unix - self.began_unix

    @property
    def share(self) -> float:
        """Fraction of the wall time spent in steps that count; 0 if unknown."""
        return self.seconds["step"] / self.wall_seconds if self.wall_seconds > 0 else 0.0


@dataclass(frozen=True)
class Span:
    """Wall time of an attempt, or between two attempts, by bucket.

    Attributes:
        attempt: its number; for the time between two attempts, that of the later one.
        began_unix: seconds since the epoch.
        ended_unix: likewise.
        seconds: by bucket of `BUCKETS`.
    """

    attempt: int
    began_unix: float
    ended_unix: float
    seconds: Mapping[str, float]


def goodput_of(record: RunRecord) -> Goodput:
    """Return seconds by bucket over all attempts of a run; empty for a run of version 0.1."""
    seconds = dict.fromkeys(BUCKETS, 0.0)
    began = ended = 0.0
    for span in spans_of(record):
        for bucket, value in span.seconds.items():
            seconds[bucket] = seconds.get(bucket, 0.0) + value
        began, ended = began or span.began_unix, max(ended, span.ended_unix)
    return Goodput(seconds, began, ended)


def spans_of(record: RunRecord) -> Iterator[Span]:
    """Return the wall time of a run as spans, attempts in order; empty for a run of version 0.1.

    Every attempt begins with a span of zero length, so that an attempt without a line also has an
    end.
    """
    lines: dict[int, list[Mapping[str, Any]]] = {}
    for line in (*record.steps, *record.undone):
        if "attempt" in line and "unix_seconds" in line:
            lines.setdefault(int(line["attempt"]), []).append(line)
    ended = 0.0
    for number, attempt in sorted(record.attempts.items()):
        began = attempt.started_unix
        if not began:
            continue
        if ended:
            yield Span(number, ended, began, {"restart": max(0.0, began - ended)})
        of_attempt = lines.get(number, [])
        yield from _attempt_spans(number, attempt, of_attempt, "restart" if ended else "start")
        ended = _end(attempt, of_attempt)


def _end(attempt: Attempt, lines: Sequence[Mapping[str, Any]]) -> float:
    last = max((line["unix_seconds"] for line in lines), default=attempt.started_unix)
    return attempt.ended_unix or last


def _attempt_spans(
    number: int, attempt: Attempt, lines: Sequence[Mapping[str, Any]], starting: str
) -> Iterator[Span]:
    end = _end(attempt, lines)
    yield Span(number, attempt.started_unix, attempt.started_unix, {})
    rest = end - attempt.started_unix
    for line in lines:
        by = {"roll_back": "roll_back", "resume": "restart"}.get(line.get("undone_by", ""))
        seconds: dict[str, float] = defaultdict(float)
        for key, value in line.items():
            if key.startswith(SECONDS):
                bucket = key.removeprefix(SECONDS)
                seconds[starting if bucket in _STARTING else by or bucket] += value
        num_seconds = sum(seconds.values())
        rest -= num_seconds
        yield Span(number, line["unix_seconds"] - num_seconds, line["unix_seconds"], seconds)
    seconds = defaultdict(float)
    for bucket, value in attempt.seconds.items():
        seconds[starting if bucket in _STARTING else bucket] += value
    rest -= sum(seconds.values())
    yield Span(number, end - sum(seconds.values()), end, seconds)
    if not attempt.outcome:
        # Killed or still running: the time after its last line is unknown and counts as lost.
        yield Span(number, end - max(0.0, rest), end, {"restart": max(0.0, rest)})
