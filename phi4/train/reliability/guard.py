"""The numerics guard: what happens after a step whose numbers are wrong.

The step itself decides, without another synchronisation: if the loss or the gradient norm is not
finite or a spike, no rank updates its weights. This hook adds the replay that distinguishes faulty
hardware from bad data, the rollback after too many bad steps in a row, and the periodic check of
replicas.
"""

from functools import partial

from phi4.engine.agreement import decided_by_writer
from phi4.engine.replicas import check_replicas
from phi4.rundir.bad_checkpoints import TIMES, note_bad
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir
from phi4.rundir.state import RunState
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress, RunContext
from phi4.train.reliability.attribution import attribute
from phi4.train.reliability.ladder import rolled_back
from phi4.train.reliability.spikes import SpikeDetector, describe, is_finite

STEPS_AFTER_LOAD = 3
"""A step that is not finite within this many steps of a load counts against the checkpoint."""


class NumericsGuard(Hook):
    """Acts on bad steps, which are those whose update was skipped.

    Args:
        context: the run's context.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        section = context.recipe.reliability
        self._spikes = SpikeDetector(section.spike_deviations, section.spike_window)
        self._loaded_step: int | None = None
        """Step of the checkpoint that training resumed from; None once that is noted as suspect."""

    def start(self, state: RunState) -> None:
        """Training continues from a checkpoint, or begins."""
        self._loaded_step = state.step or None

    def rewind(self, state: RunState) -> None:
        """The run was rolled back to a checkpoint."""
        self._loaded_step = state.step

    def act(self, progress: Progress) -> Decision:
        """Name the cause of a bad step, and roll back after too many of them in a row.

        Raises:
            CorruptionError: a machine computes or stores wrong numbers; on every rank.
            DivergedError: the run has used up its rollbacks.

        Collectives: after a bad step those of `attribute`, and a broadcast of the writer's outcome
        soon after a load; else those of `check_replicas`, when it is due.
        """
        section, context = self._context.recipe.reliability, self._context
        if progress.result.updated:
            every = section.replica_check_every
            if every and progress.step % every == 0:
                check_replicas(context.engine)
            return CONTINUE
        in_row = progress.state.numerics.bad_in_row
        wrong = describe(progress.result, self._spikes.limits(progress.state.numerics))
        arose = attribute(context, progress)
        context.say(
            f"step {progress.step}: {wrong}; the update is skipped ({in_row} in a row, "
            f"{section.max_bad_steps} allowed). A replay of the step gives the same, so the "
            f"data or the weights are the cause{f': {arose}' if arose else ''}; `phi4 data trace "
            f"{context.recipe.run.dir} --step {progress.step} --sample N` shows the data"
        )
        loaded = self._loaded_step
        if loaded is not None and self._speaks_against(loaded, progress):
            decision = self._blame_checkpoint(loaded, progress)
            if decision is not CONTINUE:
                return decision
        if in_row <= section.max_bad_steps:
            return CONTINUE
        reason = f"{in_row} bad steps in a row, the last one: {wrong}"
        return rolled_back(context.recipe, progress.state, in_row, reason)

    def _speaks_against(self, loaded_step: int, progress: Progress) -> bool:
        if is_finite(progress.result):
            return False
        return progress.step - loaded_step <= STEPS_AFTER_LOAD

    def _blame_checkpoint(self, step: int, progress: Progress) -> Decision:
        """Note a suspect checkpoint; roll back behind it once it was noted `TIMES` times."""
        context = self._context
        self._loaded_step = None
        root = checkpoints_dir(context.recipe.run.dir)
        times = decided_by_writer(context.platform, partial(note_bad, root, step, progress.step))
        name = checkpoint_name(step)
        if times < TIMES:
            context.say(
                f"{name}: training from it was not finite at step {progress.step}; the next time "
                "the checkpoint counts as bad"
            )
            return CONTINUE
        reason = f"{name} is bad: training from it was not finite {times} times"
        return rolled_back(context.recipe, progress.state, progress.step - step + 1, reason)
