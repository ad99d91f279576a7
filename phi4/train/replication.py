"""Second copies of a run's checkpoints on its hosts' own disks, made while training continues.

Every rank has a process for it in addition to the one that writes shards: a save that begins during
a copy does not wait for the copy, and abandoning a save does not abandon the copy. A copy that
fails causes a warning and loses that replica; neither the save nor the run fails.
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
    """A rank's part of a replica: in progress, complete, or failed with a reason."""

    of: ReplicaId
    is_busy: bool = True
    reason: str = ""


class Replication:
    """Copies checkpoints: every rank the files that it wrote, one rank of each host the small ones.

    The newest replica that is complete on all hosts is kept until there is a newer one.

    Args:
        platform: this process.
        place: directory of the run's replicas; see `phi4.rundir.replica.replica_place`.
        copier: a process of this rank that only makes copies.
        states: records the outcome.
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
        """Start the process, and find the replica that is kept until there is a newer one.

        Collectives: an all-gather of what the hosts hold, over all ranks.
        """
        views, rank = views_of_replicas(self._platform, self._place), self._platform.rank
        self._leads = not any(views[rank].shares_disk_with(before) for before in views[:rank])
        self._kept = newest_complete(views)
        # If it does not start, the first copy tries again and reports the failure.
        with contextlib.suppress(OSError):
            self._copier.prepare()

    def begin(self, checkpoint: Path, files: Sequence[WrittenFile]) -> None:
        """Start to copy a durable checkpoint, unless a rank is still copying an earlier one.

        Args:
            checkpoint: the same on every rank.
            files: the files of it that this rank wrote.

        Collectives: an all-gather of the outcome of the previous copy, over all ranks.
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
        """Check whether this rank's copy has ended; a failed one is reported at once."""
        if self._copy is None or not self._copy.is_busy:
            return
        reply = self._copier.reply()
        if isinstance(reply, Replicated):
            self._copy = replace(self._copy, is_busy=False)
        elif isinstance(reply, Failed):
            self._failed(reply.as_error())

    def settle(self, *, within_seconds: float, tick: Callable[[], None] = lambda: None) -> None:
        """Wait for the copy in progress, if any; a rank that takes too long abandons it.

        Args:
            within_seconds: how long.
            tick: called while it waits.

        Collectives: an all-gather of the outcome, over all ranks.
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
        """Abandon the copy in progress, and stop the process."""
        self._copier.close()

    def _failed(self, error: Exception) -> None:
        reason = f"rank {self._platform.rank} on {self._host}: {error}"
        assert self._copy is not None, "only a copy that was started can fail"
        self._copy = replace(self._copy, is_busy=False, reason=reason)
        _log.warning(
            "step %d has no replica: %s; the checkpoint itself is complete; check "
            "checkpoint.replica_dir",
            self._copy.of.step,
            reason,
        )

    def _learn(self, copies: Sequence[_Copy | None]) -> None:
        """Record the outcome of the previous copy, the same on all ranks, and forget the copy."""
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
