"""Exchanges heartbeats through the rendezvous store, over a separate connection.

Every rank writes its own key; rank 0 reads all, the others read rank 0's and its verdict: with
1,920 ranks and a heartbeat every 2 seconds some 2,000 small requests per second for the store.
"""

import os
import socket
import time
from collections.abc import Mapping

import msgspec
import torch.distributed as dist

from phi4.engine.platform import Platform
from phi4.engine.sign_in import hosts_of
from phi4.train.reliability.heartbeat import Beat
from phi4.train.reliability.phases import Phases

_VERDICT = "verdict"
_NONE_YET = "-"


class Exchange:
    """Publishes this rank's heartbeat and fetches those of the ranks that it monitors.

    Args:
        platform: this process and its store.
        phases: what the training thread is doing.
    """

    def __init__(self, platform: Platform, phases: Phases) -> None:
        self.is_first = platform.rank == 0
        self.leaves = False
        self.verdict = ""
        """Why rank 0 ends the run."""
        self._platform, self._phases = platform, phases
        self._ranks = list(range(1, platform.world_size)) if self.is_first else [0]
        self._own = Beat(platform.rank, socket.gethostname(), os.getpid())
        self.beats: Mapping[int, Beat] = {
            rank: Beat(rank, "an unknown host") for rank in self._ranks
        }
        """The newest heartbeat of every rank that this one monitors; on rank 0 of all ranks. The
        mapping is replaced, never changed."""
        self.lost: set[int] = set()
        """Ranks that can no longer be notified."""
        self._publishes, self._heard = "", False
        self._store: dist.Store | None = None

    def open(self) -> None:
        """Connect, and create the keys that are read: reading a missing key blocks."""
        whole = self._platform.store
        if whole is None:
            self.beats = {}
            return
        whole = whole.clone()  # type: ignore[attr-defined]  # missing in torch's stub
        hosts = hosts_of(whole, self._ranks)
        self.beats = {rank: Beat(rank, hosts[rank]) for rank in self._ranks}
        self._store = dist.PrefixStore("watchdog", whole)
        for key in self._keys():
            self._store.compare_set(key, "", _NONE_YET)

    def once(self) -> None:
        """Publish and fetch once. Blocks for as long as the store does not answer.

        Raises:
            DistError: the store is gone.
        """
        own, fetched = self._next_beat(), {}
        if self._store is not None:
            self._store.set(str(own.rank), msgspec.json.encode(own).decode())
            if self._publishes:
                self._store.set(_VERDICT, self._publishes)
            *texts, verdict = self._store.multi_get(self._keys())
            known = {r: t for r, t in zip(self._ranks, texts, strict=True) if t != b"-"}
            fetched = {r: msgspec.json.decode(text, type=Beat) for r, text in known.items()}
            if verdict.decode() != _NONE_YET and not self.is_first:
                self.verdict = verdict.decode()
        self.beats = {**self.beats, **fetched, **({own.rank: own} if self.is_first else {})}

    def end_with(self, message: str) -> None:
        """In the next exchange, rank 0 publishes why the run ends; other ranks acknowledge it."""
        self._publishes = message if self.is_first else ""
        self._heard = True

    def all_heard(self) -> bool:
        """Whether all ranks know that the run ends; always False on ranks other than 0."""
        living = [beat for rank, beat in self.beats.items() if rank not in self.lost]
        return self.is_first and all(beat.heard or beat.left for beat in living)

    def _keys(self) -> list[str]:
        return [*map(str, self._ranks), _VERDICT]

    def _next_beat(self) -> Beat:
        phase = self._phases.current
        self._own = msgspec.structs.replace(
            self._own,
            count=self._own.count + 1,
            phase=phase.name,
            step=phase.step,
            ticks=self._phases.ticks,
            seconds=time.monotonic() - phase.since,
            heard=self._heard,
            left=self.leaves,
        )
        return self._own
