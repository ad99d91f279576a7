"""A save that training does not wait for: scheduled when it begins, durable when all have written.

Two phases. First every rank's writer process writes its shards. Once all are on the disk, rank 0
gathers places and hashes, and its writer process writes index and manifest, renames the directory
and moves `latest`. So nothing counts that is not on the disk, whichever process dies when.

All ranks take every turn at the same step. How far each of them is travels in the reduction that
ends every training step anyway (`told`, `go_on`), so a save under way adds no collective to a step
and makes no rank wait for another. At most one is under way.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phi4.engine.agreement import Asked, asked_of_any, raise_together
from phi4.engine.checkpoint.saving import Save, SaveRequest
from phi4.engine.checkpoint_capture import ToWriterProcess
from phi4.engine.engine import Engine
from phi4.errors import Phi4Error, PlatformError
from phi4.rundir import Lease
from phi4.writer import Commit, Committed, Failed, WriterProcess

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.01
_TURN_SECONDS = 1.0
"""Longest time between two collectives of ranks that wait."""


@dataclass(frozen=True)
class Durable:
    """A save that counts.

    Attributes:
        path: of the checkpoint.
        seconds: from its beginning until all ranks know that it counts.
        stall_seconds: of these, how long training stood still.
    """

    path: Path
    seconds: float
    stall_seconds: float


class PendingSave:
    """An asynchronous save on one rank, from its beginning on; `go_on` and `wait` are collective.

    Args:
        engine: what is saved, as it is now.
        request: what and where; see `save_checkpoint`.
        writer: of this rank.
        lease: of the run on the writer rank, else None; a directory that was lost is not touched.
        seconds: the save has failed when it is not durable after so long.

    Raises:
        DiskFullError, PlatformError: it cannot begin; every rank raises it and nothing is left.

    Collectives: those of planning in dist_checkpointing; an all-reduce of a number; a broadcast of
        the verdict whether it can begin.
    """

    def __init__(
        self,
        engine: Engine,
        request: SaveRequest,
        writer: WriterProcess,
        *,
        lease: Lease | None,
        seconds: float,
    ) -> None:
        self._begun = time.monotonic()
        self._writer, self._lease = writer, lease
        self._seconds, self._limit = seconds, "checkpoint.write_seconds"
        self._platform = engine.platform
        self._save = Save(engine, request)
        self._sink = ToWriterProcess(writer)
        self._manifest: bytes | None = None
        self._commit_error: Exception | None = None
        self._error: Exception | None = None
        self._is_committed = False
        self._megatron = self._save.stage(self._sink)
        self._stall_seconds = time.monotonic() - self._begun

    @property
    def request(self) -> SaveRequest:
        """What is saved."""
        return self._save.request

    @property
    def step(self) -> int:
        """Whose save it is."""
        return self._save.request.step

    @property
    def stall_seconds(self) -> float:
        """How long training stood still for it so far."""
        return self._stall_seconds

    def told(self) -> tuple[bool, bool]:
        """Whether this rank is busy with its part, and whether that failed; looks once, cheap."""
        is_done = self._is_done()
        if self._error is None:
            self._error = self._met() if is_done else self._lateness()
        return not is_done, self._error is not None

    def go_on(self, agreed: Asked) -> Durable | None:
        """Go on with it when all ranks are done with the present part; None while it is under way.

        Args:
            agreed: what the ranks told, by `told`, since the last call.

        Raises:
            DiskFullError, PlatformError: it failed, on every rank; what was written is removed, and
                the checkpoints before it stay as they are.

        Collectives: none in most steps; once per save, those of the gathers of what was written, or
            one all-gather of what went wrong.
        """
        if agreed.save_failed:
            self.abandon()
            error = self._error
            raise_together(self._platform, None if error is None else self._save.failure(error))
        if agreed.save_is_busy:
            return None
        if self._manifest is None:
            self._commit()
            return None
        seconds = time.monotonic() - self._begun
        return Durable(self._save.directory.final, seconds, self._stall_seconds)

    def wait(
        self, tick: Callable[[], None] = lambda: None, *, within_seconds: float | None = None
    ) -> Durable:
        """Wait until it is durable.

        Args:
            tick: called while it waits.
            within_seconds: it fails when it is not durable after so long from now.

        Raises:
            DiskFullError, PlatformError: as `go_on`.

        Collectives: those of `go_on`, and about once per second those of `asked_of_any`.
        """
        if within_seconds is not None:
            left = time.monotonic() - self._begun + within_seconds
            if left < self._seconds:
                self._seconds, self._limit = left, "what a run that is told to stop waits for it"
        while True:
            turn_ends = time.monotonic() + _TURN_SECONDS
            while not self._is_done() and time.monotonic() < turn_ends:
                time.sleep(_LOOK_SECONDS)
                tick()
            told = Asked(False, False, False, *self.told())
            durable = self.go_on(asked_of_any(self._platform, told))
            if durable is not None:
                return durable

    def abandon(self) -> None:
        """Give it up, on this rank; what was written is removed without waiting for the disk."""
        self._writer.cancel()
        if self._platform.is_writer:
            discard = self._save.directory.discard
            threading.Thread(target=discard, name="discard", daemon=True).start()

    def _is_done(self) -> bool:
        """Whether this rank's part of the present phase ended, well or not."""
        if self._manifest is None:
            return self._sink.is_written()
        if not self._manifest or self._is_committed or self._commit_error is not None:
            return True
        reply = self._writer.reply()
        if isinstance(reply, Failed):
            self._commit_error = reply.as_error()
        self._is_committed = isinstance(reply, Committed)
        return reply is not None

    def _met(self) -> Exception | None:
        """What this rank could not do in the present phase, which has ended."""
        if self._manifest is None:
            return self._sink.error
        if self._commit_error is not None and self._save.directory.holds(self._manifest):
            _log.warning(
                "%s is durable, then its writer failed: %s",
                self._save.directory.final,
                self._commit_error,
            )
            return None
        return self._commit_error

    def _lateness(self) -> Exception | None:
        if time.monotonic() - self._begun <= self._seconds:
            return None
        return PlatformError(
            f"checkpoint {self._save.directory.final} is not durable after {self._seconds:.4g} s "
            f"({self._limit}), rank {self._platform.rank} still writes; check the file system, or "
            "raise the limit; earlier checkpoints are intact"
        )

    def _commit(self) -> None:
        """All ranks have written: rank 0's writer process makes it count."""
        begun = time.monotonic()
        save = self._save
        with save.engine.patches:
            for finalize in self._megatron.finalize_fns:
                finalize()
        self._manifest = save.manifest(self._sink)
        if self._platform.is_writer:
            task = Commit(
                save.directory,
                save.small_files(),
                self._manifest,
                save.request.retention,
                self._lease,
            )
            try:
                self._writer.submit(task)
            except (OSError, Phi4Error) as error:
                self._commit_error = error
        self._stall_seconds += time.monotonic() - begun
