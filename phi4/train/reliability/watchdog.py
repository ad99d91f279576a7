"""Ends a run in which a rank stopped, or in which no rank makes progress, and names it.

Each rank has two threads for it, because a collective that never ends blocks the training thread.
One exchanges heartbeats through the rendezvous store over a separate connection, and may itself be
blocked by a store that does not answer. The other evaluates the heartbeats and never blocks. Rank 0
monitors all ranks and publishes its verdict; the others monitor rank 0, whose process also hosts
the store (under torchrun the agent of the first node hosts it).

Not detected: a rank that is alive and computes something else. A rank whose Python code holds the
interpreter lock for `reliability.silence_seconds` counts as stopped, as its threads cannot run.
"""

import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed as dist

from phi4.config import ReliabilityConfig
from phi4.engine.platform import Platform
from phi4.errors import HungError
from phi4.train.reliability.exchange import Exchange
from phi4.train.reliability.heartbeat import Beat, Silence, Stall, behind, describe_ranks
from phi4.train.reliability.phases import Phases

_BEATS_PER_SILENCE = 20
_LONGEST_BEAT_SECONDS = 5.0
_FAREWELL_BEATS = 2


@contextmanager
def watched(
    platform: Platform, phases: Phases, config: ReliabilityConfig, say: Callable[[str], None]
) -> Iterator["Watchdog"]:
    """Watch all ranks for the duration of the block, which every rank of the run enters.

    A rank that leaves the block with an error sends no more heartbeats, so that the others end too,
    unless the launcher ends them first.

    Raises:
        HungError: in a thread, once the stacks of this rank are on stderr. Under
            `phi4.launch.report_errors` it ends the process.
    """
    watchdog = Watchdog(platform, phases, config, say)
    watchdog.start()
    try:
        yield watchdog
    except BaseException:
        watchdog.close(failed=True)
        raise
    watchdog.close()


class Watchdog:
    """The two threads of one rank.

    Args:
        platform: this process and its store.
        phases: what the training thread is doing.
        config: the time limits.
        say: prints one line to the console.
    """

    def __init__(
        self,
        platform: Platform,
        phases: Phases,
        config: ReliabilityConfig,
        say: Callable[[str], None],
    ) -> None:
        self.phases = phases
        self._config, self._say = config, say
        self._rank = platform.rank
        self.beat_seconds = min(_LONGEST_BEAT_SECONDS, config.silence_seconds / _BEATS_PER_SILENCE)
        self._exchange = Exchange(platform, phases)
        self._closed, self._ending, self._wake = (threading.Event() for _ in range(3))
        self._awake = AwakeClock(self.beat_seconds)
        others = [r for r in range(platform.world_size) if r] if self._rank == 0 else [0]
        self._silence = Silence(others, config.silence_seconds, self._awake.now())
        self._stall = Stall(self._awake.now())
        self._reported = False
        self._last_acts: list[Callable[[], None]] = []
        self._threads = [
            threading.Thread(target=self._beat, name="phi4-heartbeat", daemon=True),
            threading.Thread(target=self._watch, name="phi4-watchdog", daemon=True),
        ]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def at_end(self, act: Callable[[], None]) -> None:
        """Run a function in a thread when this watchdog ends the run; it has a few seconds."""
        self._last_acts.append(act)

    def close(self, *, failed: bool = False) -> None:
        """Stop watching; if this watchdog is ending the run, wait for that.

        Args:
            failed: leave without a last heartbeat, so that the others notice.
        """
        beating, watching = self._threads
        self._exchange.leaves = not failed
        self._closed.set()
        self._wake.set()
        if self._ending.is_set():
            # An error that the end of another rank caused here must not be reported instead.
            watching.join()
        if not failed:
            beating.join(timeout=(_FAREWELL_BEATS + 1) * self.beat_seconds)

    def _beat(self) -> None:
        # A store that is gone is noticed by the watching thread: rank 0 is silent then.
        with suppress(dist.DistError):
            self._exchange.open()
            while self._ending.is_set() or not self._closed.is_set():
                self._exchange.once()
                self._wake.wait(self.beat_seconds)
                if self._ending.is_set():
                    time.sleep(self.beat_seconds / 10)
            if self._exchange.leaves:
                self._say_farewell()

    def _say_farewell(self) -> None:
        """Rank 0, whose process may host the store, leaves last if the others finish soon."""
        deadline = time.monotonic() + _FAREWELL_BEATS * self.beat_seconds
        self._exchange.once()
        while self._exchange.is_first and time.monotonic() < deadline:
            if all(beat.left for beat in self._exchange.beats.values()):
                return
            time.sleep(self.beat_seconds / 10)
            self._exchange.once()

    def _watch(self) -> None:
        while not self._closed.wait(self.beat_seconds / 2):
            message = self._exchange.verdict or self._judged(self._awake.now())
            if message:
                self._ending.set()
                self._end(message)

    def _judged(self, now: float) -> str:
        """Why the run ends, or nothing."""
        beats = self._exchange.beats
        silent = self._silence.silent(beats, now)
        if silent:
            self._exchange.lost = {beat.rank for beat in silent}
            return (
                f"{describe_ranks(silent)}: no sign of life for "
                f"{self._config.silence_seconds:g} s (reliability.silence_seconds); stopped, or "
                f"its host is lost; noticed by rank {self._rank} on {socket.gethostname()}"
            )
        return self._judged_stall(beats, now) if self._exchange.is_first else ""

    def _judged_stall(self, beats: Mapping[int, Beat], now: float) -> str:
        seconds, limit = self._stall.seconds(beats, now), self._config.hang_seconds
        if seconds < min(self._config.silence_seconds, limit):
            if self._reported:
                self._say("watchdog: the ranks make progress again")
            self._reported = False
            return ""
        last = behind(beats.values())
        where = describe_ranks(last or list(beats.values()))
        who = f"behind: {where}" if last else f"all are at the same point: {where}"
        if seconds >= limit:
            return f"no rank made progress for {limit:g} s (reliability.hang_seconds); {who}"
        if not self._reported:
            self._say(f"watchdog: no rank made progress for {seconds:.0f} s, all live; {who}")
        self._reported = True
        return ""

    def _end(self, message: str) -> None:
        """Print the stacks of this rank's threads, and leave together with the other ranks.

        Raises:
            HungError: always.
        """
        with suppress(Exception):
            print(f"watchdog of rank {self._rank}: {message}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._exchange.end_with(message)
        self._wake.set()
        deadline = time.monotonic() + _FAREWELL_BEATS * self.beat_seconds
        acting = [threading.Thread(target=act, daemon=True) for act in self._last_acts]
        for thread in acting:
            thread.start()
        for thread in acting:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        while time.monotonic() < deadline and not self._exchange.all_heard():
            if not self._threads[0].is_alive():
                break  # the store is gone, so the others are leaving
            time.sleep(self.beat_seconds / 10)
        raise HungError(message)


class AwakeClock:
    """Seconds during which this process ran: after a SIGSTOP it must not accuse other ranks.

    Args:
        longest_seconds: longest gap between two readings; any excess was spent stopped.
    """

    def __init__(self, longest_seconds: float) -> None:
        self._longest = longest_seconds
        self._last, self._awake = time.monotonic(), 0.0

    def now(self) -> float:
        """Seconds since the clock was made."""
        now = time.monotonic()
        self._awake += min(now - self._last, self._longest)
        self._last = now
        return self._awake
