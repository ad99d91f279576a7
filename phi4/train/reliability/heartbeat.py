"""The heartbeat of a rank, and what other ranks conclude from it. No threads, no clocks.

A rank is alive if its heartbeat changes, timed by the observer's own clock, so that the clocks of
hosts need not agree. Its ticks show whether it makes progress.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

_NAMED_RANKS = 8
_NEARLY = 0.8
"""A rank that was silent for this share of the limit is named together with one that reached it:
ranks of one host fall silent within a heartbeat of each other."""


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """One heartbeat of a rank."""

    rank: int
    host: str
    pid: int = 0
    """0 before the rank's first own heartbeat."""
    count: int = 0
    """Number of heartbeats so far, so that two heartbeats always differ."""
    phase: str = "start"
    step: int = 0
    ticks: int = 0
    seconds: float = 0.0
    """Time in this phase."""
    heard: bool = False
    """The rank knows that the run ends."""
    left: bool = False
    """The rank has finished and is no longer watched."""

    def describe(self) -> str:
        """For a message: which rank, where it runs, what it was doing."""
        if not self.pid:
            return f"rank {self.rank} on {self.host}, before its first heartbeat"
        return (
            f"rank {self.rank} on {self.host} (pid {self.pid}), last heard {self.seconds:.1f} s "
            f"into phase {self.phase} after step {self.step}"
        )


def describe_ranks(beats: Sequence[Beat]) -> str:
    """The first few ranks, for a message."""
    more = f"; and {len(beats) - _NAMED_RANKS} more" if len(beats) > _NAMED_RANKS else ""
    return "; ".join(beat.describe() for beat in beats[:_NAMED_RANKS]) + more


class Silence:
    """Finds ranks whose heartbeat has not changed for too long.

    Args:
        ranks: the ranks to watch.
        silence_seconds: longest silence that is tolerated.
        now: seconds of the observer's clock.
    """

    def __init__(self, ranks: Iterable[int], silence_seconds: float, now: float) -> None:
        self._seconds = silence_seconds
        self._seen = dict.fromkeys(ranks, (-1, now))

    def silent(self, beats: Mapping[int, Beat], now: float) -> list[Beat]:
        """Watched ranks that have not left and whose heartbeat is too old.

        Args:
            beats: the newest heartbeat of every watched rank.
            now: seconds of the observer's clock; never decreases.
        """
        ages = {}
        for rank, (count, since) in self._seen.items():
            if beats[rank].count != count:
                self._seen[rank] = (beats[rank].count, now)
            elif not beats[rank].left:
                ages[rank] = now - since
        if max(ages.values(), default=0.0) <= self._seconds:
            return []
        return [beats[rank] for rank, age in ages.items() if age > _NEARLY * self._seconds]


class Stall:
    """Measures for how long no rank has made progress.

    Args:
        now: seconds of the observer's clock.
    """

    def __init__(self, now: float) -> None:
        self._ticks: dict[int, int] = {}
        self._since = now

    def seconds(self, beats: Mapping[int, Beat], now: float) -> float:
        """Since the last tick of any rank; 0 once a rank has left.

        Args:
            beats: the newest heartbeat of every rank.
            now: seconds of the observer's clock; never decreases.
        """
        ticks = {rank: beat.ticks for rank, beat in beats.items()}
        if ticks != self._ticks or any(beat.left for beat in beats.values()):
            self._ticks, self._since = ticks, now
        return now - self._since


def behind(beats: Iterable[Beat]) -> list[Beat]:
    """Ranks that the others probably wait for; empty if all are at the same point.

    Those with the fewest completed steps; among these the ones in another phase than most; among
    these the ones with the fewest ticks.
    """
    all_beats = list(beats)
    if len({(beat.step, beat.phase, beat.ticks) for beat in all_beats}) == 1:
        return []
    first_step = min(beat.step for beat in all_beats)
    rest = [beat for beat in all_beats if beat.step == first_step]
    (phase, _), *_ = Counter(beat.phase for beat in all_beats).most_common(1)
    rest = [beat for beat in rest if beat.phase != phase] or rest
    fewest = min(beat.ticks for beat in rest)
    return [beat for beat in rest if beat.ticks == fewest]
