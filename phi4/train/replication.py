"""Second copies of a run's checkpoints on its hosts' own disks, made while training continues.

Every rank has a process for it besides the one that writes shards: a save that begins while a copy
is made does not wait for it, and a save that is given up does not take the copy with it. A copy
that fails costs a warning and that replica, neither the save nor the run.
"""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi4.engine.agreement import gathered
from phi4.engine.checkpoint import newest_complete, views_of_replicas
from phi4.engine.platform import Platform
from phi4.rundir.checkpoints import step_of
from phi4.rundir.manifest import FileEntry, manifest_hash
from phi4.rundir.replica import ReplicaId
from phi4.train.save_states import SaveStates
from phi4.writer import Failed, Replicate, Replicated, WriterProcess, WrittenFile

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class _Copy:
    """A rank's part of a replica: being made, there, or failed for a reason."""

    of: ReplicaId
    is_busy: bool = True
    reason: str = ""


class Replication:
    """Has every rank copy what it wrote of a checkpoint, and one rank of each host the small files.

    The newest replica that all hosts hold stays until there is a newer one.

    Args:
        platform: this process.
        place: of the run's replicas; see `phi4.rundir.replica.replica_place`.
        copier: a process of this rank for nothing else.
        states: where the outcome is noted.
    """

    def __init__(
        self,
        platform: Platform,
        place: Path,
        copier: WriterProcess,
        states: SaveStates,
    ) -> None:
        self._platform, self._place, self._copier = platform, place, copier
        self._states, self._host = states, socket.gethostname()
        self._leads = False
        self._kept: ReplicaId | None = None
        self._copy: _Copy | None = None

    def start(self) -> None:
        """Start the process, and find the replica that stays until there is a newer one.

        Collectives: an all-gather of what the hosts hold, over all ranks.
        """
        views, rank = views_of_replicas(self._platform, self._place), self._platform.rank
        self._leads = not any(views[rank].shares_disk_with(before) for before in views[:rank])
        self._kept = newest_complete(views)
        # One that does not start is tried again, and named, with the first copy.
        with contextlib.suppress(OSError):
            self._copier.prepare()

    def begin(self, checkpoint: Path, files: Sequence[WrittenFile]) -> None:
        """Have a checkpoint copied that counts, unless a rank still copies one before it.

        Args:
            checkpoint: the same on every rank.
            files: what this rank wrote of it.

        Collectives: an all-gather of what became of the copy before it, over all ranks.
        """
        self.look()
        step, digest = step_of(checkpoint), ""
        if self._platform.is_writer:
            with contextlib.suppress(OSError):
                digest = manifest_hash(checkpoint)
        everyone = gathered(self._platform, (self._copy, digest))
        copies, digest = [copy for copy, _ in everyone], everyone[0][1]
        busy = [(rank, copy) for rank, copy in enumerate(copies) if copy and copy.is_busy]
        if busy:
            before, others = busy[0][1].of.step, len(busy) - 1
            who = f"rank {busy[0][0]}" + (f" and {others} others" if others else "")
            self._states.replica_left_out(step, f"step {before} is still copied by {who}")
            return
        self._learn(copies)
        if not digest:
            self._states.replica_left_out(step, f"rank 0 cannot read the manifest of {checkpoint}")
            return
        of = ReplicaId(step, digest)
        entries = {file.name: FileEntry(file.num_bytes, file.sha256) for file in files}
        self._copy = _Copy(of)
        task = Replicate(checkpoint.resolve(), self._place, of, entries, self._leads, self._kept)
        try:
            self._copier.submit(task)
        except OSError as error:
            self._failed(error)

    def look(self) -> None:
        """See whether this rank's copy ended; a failed one is reported at once."""
        if self._copy is None or not self._copy.is_busy:
            return
        reply = self._copier.reply()
        if isinstance(reply, Replicated):
            self._copy = replace(self._copy, is_busy=False)
        elif isinstance(reply, Failed):
            self._failed(reply.as_error())

    def settle(self, *, within_seconds: float, tick: Callable[[], None] = lambda: None) -> None:
        """Wait for the copy that is being made, if one is; a rank that takes too long gives it up.

        Args:
            within_seconds: how long.
            tick: called while it waits.

        Collectives: an all-gather of what became of it, over all ranks.
        """
        deadline = time.monotonic() + within_seconds
        while self._copy is not None and self._copy.is_busy:
            if time.monotonic() > deadline:
                self._copier.cancel()
                self._failed(OSError(f"not copied after {within_seconds:.4g} s"))
                break
            time.sleep(_LOOK_SECONDS)
            tick()
            self.look()
        self._learn(gathered(self._platform, self._copy))

    def close(self) -> None:
        """Give up what is being copied, and end the process."""
        self._copier.close()

    def _failed(self, error: Exception) -> None:
        reason = f"rank {self._platform.rank} on {self._host}: {error}"
        assert self._copy is not None, "what failed was begun"
        self._copy = replace(self._copy, is_busy=False, reason=reason)
        _log.warning(
            "step %d has no replica: %s; the checkpoint counts all the same; check "
            "checkpoint.replica_dir",
            self._copy.of.step,
            reason,
        )

    def _learn(self, copies: Sequence[_Copy | None]) -> None:
        """Take what became of the copy before, on all ranks alike; it is known only once."""
        made = [copy for copy in copies if copy is not None]
        self._copy = None
        if not made:
            return
        reasons = dict.fromkeys(copy.reason for copy in made if copy.reason)
        if reasons:
            self._states.not_replicated(made[0].of.step, "; ".join(reasons))
            return
        self._kept = made[0].of
        self._states.replicated(made[0].of.step)
