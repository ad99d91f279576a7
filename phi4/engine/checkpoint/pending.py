"""Asynchronous saves: scheduled when they begin, durable when all ranks have written.

A save has two phases. First every rank's writer process writes its shards. Once all are durable,
rank 0 gathers locations and hashes, and its writer process writes index and manifest, renames the
directory and updates `latest`. A checkpoint thus counts only if it is durable, whichever process
dies at any time.

All ranks change phase at the same step. Their progress is part of the reduction at the end of every
training step (`told`, `go_on`), so a save in progress adds no collective to a step and makes no
rank wait for another. At most one is in progress.
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
    """A save that is durable.

    Attributes:
        path: path of the checkpoint.
        seconds: time from its beginning until all ranks know that it is durable.
        stall_seconds: the part of it during which training was blocked.
    """

    path: Path
    seconds: float
    stall_seconds: float


class PendingSave:
    """An asynchronous save on one rank; `go_on` and `wait` are collective.

    Args:
        engine: engine whose current state is saved.
        request: content and location; see `save_checkpoint`.
        writer: writer process of this rank.
        lease: lease of the run on the writer rank, else None; a lost directory is not modified.
        seconds: time after which a save that is not durable has failed.

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
        """Step of the checkpoint."""
        return self._save.request.step

    @property
    def stall_seconds(self) -> float:
        """Time for which training has been blocked by it so far."""
        return self._stall_seconds

    def told(self) -> tuple[bool, bool]:
        """Return whether this rank is busy with its part, and whether that failed; polls once,
        cheaply."""
        is_done = self._is_done()
        if self._error is None:
            self._error = self._met() if is_done else self._lateness()
        return not is_done, self._error is not None

    def go_on(self, agreed: Asked) -> Durable | None:
        """Enter the next phase when all ranks have finished the current one; None while in
        progress.

        Args:
            agreed: union of the ranks' `told` since the last call.

        Raises:
            DiskFullError, PlatformError: it failed, on every rank; written files are removed, and
                earlier checkpoints are unaffected.

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
            within_seconds: time from now after which it fails if it is not durable.

        Raises:
            DiskFullError, PlatformError: as `go_on`.

        Collectives: those of `go_on`, and about once per second those of `asked_of_any`.
        """
        if within_seconds is not None:
            left = time.monotonic() - self._begun + within_seconds
            if left < self._seconds:
                self._seconds, self._limit = left, "the limit for a run that was told to stop"
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
        """Abort it on this rank; written files are removed without waiting for the disk."""
        self._writer.cancel()
        if self._platform.is_writer:
            discard = self._save.directory.discard
            threading.Thread(target=discard, name="discard", daemon=True).start()

    def _is_done(self) -> bool:
        """Return whether this rank's part of the current phase ended, successfully or not."""
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
        """Return this rank's error of the current phase, which has ended."""
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
            f"({self._limit}), rank {self._platform.rank} is still writing; check the file system, "
            f"or raise the limit; earlier checkpoints are intact"
        )

    def _commit(self) -> None:
        """Commit after all ranks have written: rank 0's writer process makes the checkpoint
        count."""
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
