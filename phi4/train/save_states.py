"""Reports the states of saves: on the console, in checkpoints.jsonl and in the run's record."""

import contextlib
from pathlib import Path

from phi4.engine.checkpoint import Durable, SaveRequest
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.save_log import SaveLog, SaveState
from phi4.train.hooks import RunContext


class SaveStates:
    """Reports the outcome of every save.

    Args:
        context: the run's context; the file is written on the rank that holds the lease.
    """

    def __init__(self, context: RunContext) -> None:
        self._say = context.say
        self._log = None
        if context.lease is not None:
            self._log = SaveLog(Path(context.recipe.run.dir), context.lease.number)
        self._numbers: dict[str, float] = {}
        self._chooses_format = context.recipe.parallel.distributed_optimizer
        self._shown_format: str | None = None

    def numbers(self) -> dict[str, float]:
        """Numbers for the next step's record, each reported once.

        durable_step, the newest step with a complete checkpoint; save_seconds, how long its save
        took; save_stall_seconds, how long it stopped training; replica_step, the newest step with a
        replica that is complete on all hosts.
        """
        numbers, self._numbers = self._numbers, {}
        return numbers

    def scheduled(self, request: SaveRequest, stall_seconds: float, reason: str) -> None:
        """Training continues while the writer processes write the checkpoint."""
        self._say(f"checkpoint step {request.step} scheduled{self._format(request, reason)}")
        self._note(
            request.step,
            "scheduled",
            optimizer_format=request.form,
            stall_seconds=stall_seconds,
        )

    def durable(self, request: SaveRequest, durable: Durable) -> None:
        """The checkpoint of a scheduled save is complete."""
        self._say(
            f"checkpoint step {request.step} durable after {durable.seconds:.1f} s: {durable.path}"
        )
        self._noted_durable(request, durable)

    def saved(self, request: SaveRequest, durable: Durable, reason: str) -> None:
        """The checkpoint of a blocking save is complete."""
        self._say(f"saved {durable.path}{self._format(request, reason)}")
        self._noted_durable(request, durable)

    def failed(self, step: int, error: Exception, next_try: int | None = None) -> None:
        """A save failed; it is retried after step `next_try`, or the run ends with the error."""
        if next_try is not None:
            self._say(
                f"step {step} is not saved: {error}; training continues and tries again after step "
                f"{next_try}"
            )
        self._note(step, "failed", reason=str(error))

    def refused(self, step: int, reason: str) -> None:
        """A save was not started."""
        self._say(f"step {step} is not saved: {reason}; the checkpoints before it stay")
        self._note(step, "refused", reason=reason)

    def replicated(self, step: int) -> None:
        """The replica is complete on all hosts."""
        self._numbers["replica_step"] = step
        self._note(step, "replicated")

    def not_replicated(self, step: int, reason: str) -> None:
        """A host could not copy its part; the rank that failed has reported it."""
        self._note(step, "not_replicated", reason=reason)

    def replica_left_out(self, step: int, reason: str) -> None:
        """No copy was started."""
        self._say(f"step {step} has no replica: {reason}; the checkpoint itself is complete")
        self._note(step, "not_replicated", reason=reason)

    def _format(self, request: SaveRequest, reason: str) -> str:
        """The optimizer format with its reason, if there is a choice and it has changed."""
        if not self._chooses_format or request.form == self._shown_format:
            return ""
        self._shown_format = request.form
        return f" (optimizer format {request.form}: {reason})"

    def _noted_durable(self, request: SaveRequest, durable: Durable) -> None:
        self._numbers |= {
            "durable_step": request.step,
            "save_seconds": durable.seconds,
            "save_stall_seconds": durable.stall_seconds,
        }
        self._note(
            request.step,
            "durable",
            optimizer_format=request.form,
            seconds=durable.seconds,
            stall_seconds=durable.stall_seconds,
            manifest_sha256=self._manifest_hash(durable.path),
        )

    def _manifest_hash(self, checkpoint: Path) -> str:
        """Empty on ranks without the log, or if unreadable: then no replica is accepted for it."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                return manifest_hash(checkpoint)
        return ""

    def _note(self, step: int, state: SaveState, **fields: object) -> None:
        if self._log is not None:
            self._log.note(step, state, **fields)
