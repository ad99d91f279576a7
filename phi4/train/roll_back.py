"""A rollback in memory: the engine returns to an earlier checkpoint, the data loader does not.

So the data of the undone steps is skipped: the loader is already past it, whatever blend it came
from.
"""

from collections.abc import Callable
from pathlib import Path

from phi4.engine.agreement import decided_by_writer
from phi4.engine.checkpoint import checkpoints_newest_first
from phi4.errors import CheckpointError, DivergedError
from phi4.rundir.checkpoints import checkpoints_dir, step_of
from phi4.rundir.roll_back import commit_roll_back, continued_behind
from phi4.rundir.state import RunState
from phi4.train.hooks import RollBack, RunContext
from phi4.train.ownership import require_ownership
from phi4.train.resume import Restoring, newest_loaded


def roll_back(
    context: RunContext,
    now: RunState,
    asked: RollBack,
    *,
    rewind_records: Callable[[int], None],
) -> RunState:
    """Return to the newest checkpoint that loads and is old enough; returns the run's state.

    The state keeps the present ledger: the data of the undone steps is skipped. The rollback is
    committed to disk before any record of the undone steps is removed.

    Args:
        context: the run's context; its engine is restored.
        now: the run's present state.
        asked: how far to go back, and why.
        rewind_records: called on the writer rank with the step that the run returns to.

    Raises:
        OwnershipError: the run directory was lost.
        CheckpointError: no checkpoint is old enough, or none of them loads.
        DivergedError: likewise, if bad numbers are the cause.
        DiskFullError, PlatformError: the rollback cannot be written; it has taken effect only if
            its own file was.

    Collectives: those of `require_ownership` and `newest_loaded`; broadcasts of the candidates and
    of the writer's outcome, over all ranks.
    """
    recipe, say = context.recipe, context.say
    require_ownership(context.platform, context.lease)
    restoring = Restoring(recipe, context.engine, context.source_hashes, say, allow_change=True)
    try:
        checkpoint, saved = newest_loaded(restoring, _old_enough(context, now, asked))
    except CheckpointError as error:
        raise DivergedError(str(error)) if asked.of_bad_numbers else error from None
    row_units = recipe.data.sequence_length // recipe.data.unit_tokens
    state = continued_behind(saved, now, row_units=row_units, reason=asked.reason)

    def commit() -> None:
        commit_roll_back(Path(recipe.run.dir), state)
        rewind_records(state.step)

    decided_by_writer(context.platform, commit)
    rows = state.skips[-1].rows
    say(
        f"rolled back from step {now.step} to {checkpoint}: {asked.reason}; {rows:,} rows are "
        "skipped"
    )
    return state


def _old_enough(context: RunContext, now: RunState, asked: RollBack) -> list[Path]:
    root, last = checkpoints_dir(context.recipe.run.dir), now.step - asked.steps
    found = checkpoints_newest_first(context.platform, root)
    candidates = [path for path in found if step_of(path) <= last]
    if not candidates:
        there = ", ".join(path.name for path in found) or "nothing"
        raise CheckpointError(
            f"a rollback of {asked.steps} steps from step {now.step} ({asked.reason}) needs a "
            f"checkpoint of step {last} or before, {root} holds {there}; lower checkpoint.every or "
            "raise checkpoint.keep, and start the run again from its newest checkpoint"
        )
    return candidates
