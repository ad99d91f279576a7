"""When a run saves, and the outcome of each save.

A save is `scheduled` while training continues and the ranks' writer processes write it, and
`durable` once the checkpoint is complete; a blocking save is durable at once. At most one save is
in progress: one that falls due meanwhile starts when it has ended, with the step that the run has
reached by then. The last save of a run waits for the one in progress, and is itself blocking.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from phi4.config import dump_toml
from phi4.engine.agreement import decided_by_writer, done_by_all
from phi4.engine.checkpoint import (
    Durable,
    PendingSave,
    SaveRequest,
    host_memory_bytes,
    optimizer_format,
    predicted_gather_bytes,
    save_checkpoint,
)
from phi4.engine.replicas import require_finite_parameters
from phi4.errors import DiskFullError, NotFiniteError, PlatformError
from phi4.rundir.checkpoints import Retention, checkpoints_dir
from phi4.rundir.names import RECIPE_FILE, STATE_FILE
from phi4.rundir.replica import replica_place
from phi4.rundir.state import RunState
from phi4.train.hooks import Hook, Progress, RunContext
from phi4.train.meter import Stopwatch
from phi4.train.ownership import require_ownership
from phi4.train.replication import Replication
from phi4.train.save_states import SaveStates
from phi4.writer import Staging, WriterProcess

_RETRIES_PER_INTERVAL = 10
"""Retries of a failed save before the next one is due."""


class Checkpointer:
    """Saves every `checkpoint.every` steps and at the end.

    It is not a hook: it acts after the decisions of all hooks, so that a step that a hook rejects
    is not saved, and a step that a hook makes the last one is saved once.

    A save that fails on the disk does not end the run: training continues, and the save is retried
    soon. Only the save of the last step must succeed.

    Args:
        context: the run's context.

    Attributes:
        hook: adds the outcome of saves to the run's record; starts and stops the writer process.

    Collectives: two all-reduces of a number over all ranks, on construction; a broadcast of a path,
        with `checkpoint.replica_dir`.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._gather_bytes = predicted_gather_bytes(context.engine, context.platform.ranks_per_host)
        self._memory_bytes = host_memory_bytes(context.engine)
        self._next_try: int | None = None
        self._owes_reshardable = False
        self._states = SaveStates(context)
        self._pending: PendingSave | None = None
        self._writer: WriterProcess | None = None
        context.requests.save_progress = self._told
        if context.recipe.checkpoint.asynchronous:
            platform = context.platform
            self._writer = WriterProcess(Staging(platform.device, platform.ranks_per_host))
        self._replication = _replication(context, self._states)
        self.hook: Hook = _SaveHook(self, self._states)

    def start(self) -> None:
        """Start this rank's writer process, so that the first save finds it ready.

        Collectives: an all-gather of outcomes over all ranks, with `checkpoint.asynchronous`; those
            of `Replication.start`, with `checkpoint.replica_dir`.
        """
        if self._writer is not None:
            done_by_all(self._context.platform, self._writer.prepare)
        if self._replication is not None:
            self._replication.start()

    def save_when_due(
        self, progress: Progress, *, is_last: bool, is_asked: bool = False
    ) -> Literal["scheduled", "durable"] | None:
        """Advance the save in progress; start one that is due, overdue or requested.

        Args:
            progress: the step.
            is_last: the run ends with this step, so it is saved, and the save is blocking.
            is_asked: a save was requested.

        Returns:
            The state of this step's save; None without one.

        Raises:
            OwnershipError: the run directory was lost; on every rank.
            DiskFullError, PlatformError: the last step cannot be saved.
            NotFiniteError: the weights are not finite, so nothing was written; on every rank.

        Collectives: those of `require_ownership` and of saving, when it saves; those of
            `PendingSave.go_on`, when all ranks are done with a part of the save in progress; those
            of `Replication.begin` for a durable checkpoint, and of `settle` at the end of the run.
        """
        config, step = self._context.recipe.checkpoint, progress.step
        if self._replication is not None:
            self._replication.look()
        resharding = config.reshardable_every
        if self._pending is not None:
            self._concluded(partial(self._pending.go_on, progress.result.asked), step)
        if resharding > 0 and step % resharding == 0 and progress.is_due(config.every):
            self._owes_reshardable = True
        is_owed = self._next_try is not None and step >= self._next_try
        if not (is_last or is_asked or progress.is_due(config.every) or is_owed):
            return None
        if is_last:
            # A run that was asked to stop needs the other half of its time for this step's save.
            stop_seconds = self._context.recipe.reliability.stop_seconds
            self.settle(step, within_seconds=None if progress.is_last else stop_seconds / 2)
            self._finish_replica(progress)
        if self._pending is not None:
            if not is_owed:
                self._context.say(
                    f"the save of step {step} is put off until that of step {self._pending.step} "
                    "is durable"
                )
            self._next_try = step
            return None
        try:
            self._save(progress, waits=is_last)
        except (DiskFullError, PlatformError) as error:
            if is_last:
                self._states.failed(step, error)
                raise
            self._try_again(step, step, error)
            return None
        if is_last:
            self._finish_replica(progress)
        return "durable" if self._pending is None else "scheduled"

    def settle(self, step: int, *, within_seconds: float | None = None) -> None:
        """Wait for the save in progress, if any; a failure is only logged.

        Args:
            step: the step that the run has reached.
            within_seconds: time after which the save is abandoned; None for no limit.

        Collectives: those of `PendingSave.wait`.
        """
        if self._pending is not None:
            pending, tick = self._pending, self._context.phases.tick
            self._concluded(lambda: pending.wait(tick, within_seconds=within_seconds), step)

    def rewind(self) -> None:
        """The run was rolled back: a retry that is still due belongs to an undone step."""
        self._next_try = None

    def close(self) -> None:
        """Abandon the save in progress, and stop the writer process of this rank."""
        if self._pending is not None:
            self._pending.abandon()
            self._pending = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._replication is not None:
            self._replication.close()
            self._replication = None

    def _finish_replica(self, progress: Progress) -> None:
        """Wait for the copy if the run is finished; one that was asked to stop has no time."""
        if self._replication is not None and progress.is_last:
            seconds = self._context.recipe.checkpoint.write_seconds
            self._replication.settle(within_seconds=seconds, tick=self._context.phases.tick)

    def _told(self) -> tuple[bool, bool]:
        return (False, False) if self._pending is None else self._pending.told()

    def _require_finite(self, step: int) -> None:
        try:
            require_finite_parameters(self._context.engine)
        except NotFiniteError as error:
            self._states.refused(step, str(error))
            raise

    def _save(self, progress: Progress, *, waits: bool) -> None:
        context, config = self._context, self._context.recipe.checkpoint
        require_ownership(context.platform, context.lease)
        self._require_finite(progress.step)
        form, reason = optimizer_format(
            config,
            self._gather_bytes,
            self._memory_bytes,
            reshardable_due=self._owes_reshardable,
        )
        request = SaveRequest(
            root=checkpoints_dir(context.recipe.run.dir),
            step=progress.step,
            form=form,
            retention=Retention(config.keep, config.keep_every),
            files={RECIPE_FILE: dump_toml(context.recipe), STATE_FILE: progress.state.to_json()},
            data=context.source_hashes,
        )
        if waits or self._writer is None:
            watch = Stopwatch()
            path = save_checkpoint(
                context.engine,
                request.root,
                request.step,
                form=form,
                keep=config.keep,
                keep_every=config.keep_every,
                files=request.files,
                data=request.data,
            )
            seconds = watch.lap()
            self._states.saved(request, Durable(path, seconds, seconds), reason)
            self._succeeded(request, path)
            return
        self._pending = PendingSave(
            context.engine,
            request,
            self._writer,
            lease=context.lease,
            seconds=config.write_seconds,
        )
        self._next_try = None
        self._states.scheduled(request, self._pending.stall_seconds, reason)

    def _concluded(self, outcome: Callable[[], Durable | None], step: int) -> None:
        """Handle the outcome of the save in progress, if it has ended."""
        pending = self._pending
        assert pending is not None, "only a save in progress has an outcome"
        try:
            durable = outcome()
        except (DiskFullError, PlatformError) as error:
            self._pending = None
            self._try_again(pending.step, step, error)
            return
        if durable is not None:
            self._pending = None
            self._states.durable(pending.request, durable)
            self._succeeded(pending.request, durable.path)

    def _succeeded(self, request: SaveRequest, path: Path) -> None:
        if self._next_try is not None and self._next_try <= request.step:
            self._next_try = None
        if request.form == "full":
            self._owes_reshardable = False
        if self._replication is not None:
            # At most one save is in progress, so the newest sink is the one of this save.
            self._replication.begin(path, self._context.engine.patches.capture.sink.files)

    def _try_again(self, saved_step: int, step: int, error: Exception) -> None:
        every = self._context.recipe.checkpoint.every
        self._next_try = step + max(1, every // _RETRIES_PER_INTERVAL)
        self._states.failed(saved_step, error, self._next_try)


def _replication(context: RunContext, states: SaveStates) -> Replication | None:
    recipe, platform = context.recipe, context.platform
    replica_dir = recipe.checkpoint.replica_dir
    if not replica_dir:
        return None
    place = decided_by_writer(platform, partial(replica_place, replica_dir, recipe.run.dir))
    copier = WriterProcess(Staging(platform.device, platform.ranks_per_host))
    return Replication(platform, place, copier, states)


class _SaveHook(Hook):
    """See `Checkpointer.hook`."""

    def __init__(self, checkpointer: Checkpointer, states: SaveStates) -> None:
        self._checkpointer, self._states = checkpointer, states

    def start(self, state: RunState) -> None:
        """See `Checkpointer.start`."""
        self._checkpointer.start()

    def measure(self, progress: Progress) -> dict[str, float]:
        """See `SaveStates.numbers`."""
        return self._states.numbers()

    def close(self) -> None:
        """See `Checkpointer.close`."""
        self._checkpointer.close()
