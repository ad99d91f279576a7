"""When a run saves."""

from phi4.config import dump_toml
from phi4.engine.checkpoint import (
    host_memory_bytes,
    optimizer_format,
    predicted_gather_bytes,
    save_checkpoint,
)
from phi4.engine.replicas import require_finite_parameters
from phi4.errors import DiskFullError, PlatformError
from phi4.rundir.checkpoints import checkpoints_dir
from phi4.rundir.names import RECIPE_FILE, STATE_FILE
from phi4.train.hooks import Progress, RunContext
from phi4.train.ownership import require_ownership

_RETRIES_PER_INTERVAL = 10
"""How often a save that failed is tried again until the next one is due anyway."""


class Checkpointer:
    """Saves every `checkpoint.every` steps and at the end.

    It is no hook: it comes after the decisions of all hooks, so that a step that one of them
    rejects is not saved, and one that is the last after all is saved once.

    A save that the disk refuses does not end the run: training goes on from memory, and the save is
    tried again soon. Only the last step's has to succeed.

    Collectives: two all-reduces of a number over all ranks, on construction.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._gather_bytes = predicted_gather_bytes(context.engine, context.platform.ranks_per_host)
        self._memory_bytes = host_memory_bytes(context.engine)
        self._retry_step: int | None = None
        self._owes_reshardable = False

    def save_when_due(self, progress: Progress, *, is_last: bool, is_asked: bool = False) -> bool:
        """Save when it is due, owed or asked for, or when the run ends with this step.

        Returns:
            Whether the step is saved.

        Raises:
            OwnershipError: the run directory was lost; on every rank.
            DiskFullError, PlatformError: the last step cannot be saved.
            NotFiniteError: the weights are not finite, so nothing was written; on every rank.

        Collectives: those of `require_ownership` and of `save_checkpoint`, when it saves.
        """
        config, step = self._context.recipe.checkpoint, progress.step
        resharding = config.reshardable_every
        if resharding > 0 and step % resharding == 0 and progress.is_due(config.every):
            self._owes_reshardable = True
        is_due = is_last or is_asked or progress.is_due(config.every)
        if not (is_due or step == self._retry_step):
            return False
        try:
            self._save(progress)
        except (DiskFullError, PlatformError) as error:
            if is_last:
                raise
            self._retry_step = step + max(1, config.every // _RETRIES_PER_INTERVAL)
            self._context.say(
                f"step {step} is not saved: {error}; training goes on and tries again after step "
                f"{self._retry_step}"
            )
            return False
        self._retry_step, self._owes_reshardable = None, False
        return True

    def rewind(self) -> None:
        """The run was rolled back: what a failed save owed belongs to an undone step."""
        self._retry_step = None

    def _save(self, progress: Progress) -> None:
        context = self._context
        require_ownership(context.platform, context.lease)
        require_finite_parameters(context.engine)
        config = context.recipe.checkpoint
        form, reason = optimizer_format(
            config,
            self._gather_bytes,
            self._memory_bytes,
            reshardable_due=self._owes_reshardable,
        )
        path = save_checkpoint(
            context.engine,
            checkpoints_dir(context.recipe.run.dir),
            progress.step,
            form=form,
            keep=config.keep,
            files={RECIPE_FILE: dump_toml(context.recipe), STATE_FILE: progress.state.to_json()},
            data=context.source_hashes,
        )
        context.say(f"saved {path} (optimizer format {form}: {reason})")
