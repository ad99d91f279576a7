"""Escalation after repeated bad numbers: a rollback, or the end of the run."""

from typing import Literal

from phi4.config import Recipe
from phi4.errors import DivergedError, NotFiniteError
from phi4.rundir.state import RunState
from phi4.train.checkpointing import Checkpointer
from phi4.train.hooks import CONTINUE, Decision, Progress, RollBack, RunContext, SaveAndStop


def rolled_back(recipe: Recipe, state: RunState, steps: int, reason: str) -> RollBack:
    """The decision to undo steps whose numbers are wrong.

    Raises:
        DivergedError: the run used up `reliability.max_roll_backs`.
    """
    allowed = recipe.reliability.max_roll_backs
    if state.roll_backs >= allowed:
        raise DivergedError(
            f"step {state.step}: {reason}, and the run was rolled back {state.roll_backs} times "
            f"already (reliability.max_roll_backs={allowed}); look at the data (`phi4 data ledger "
            f"{recipe.run.dir}` lists what was skipped), lower optim.learning_rate or set "
            "optim.clip_grad"
        )
    return RollBack(steps, reason, of_bad_numbers=True)


def save_or_roll_back(
    context: RunContext, checkpointer: Checkpointer, progress: Progress, decision: Decision
) -> tuple[Literal["scheduled", "durable"] | None, Decision]:
    """Save a step if that is due or requested; roll back if its weights are not finite.

    During a series of bad steps nothing is saved, unless the run ends or stops: the rollback needs
    the checkpoint from before them, which newer ones would rotate out.

    Args:
        context: the run's context.
        checkpointer: saves the step.
        progress: the step.
        decision: the hooks' decision: to continue or to stop.

    Returns:
        The state of the step's save, None without one; and how the run continues.

    Raises:
        DivergedError: the weights are not finite, and the run stops, or was rolled back too often.
        Phi4Error: the save failed.

    Collectives: those of `Checkpointer.save_when_due`.
    """
    stops = progress.is_last or isinstance(decision, SaveAndStop)
    if progress.state.numerics.bad_in_row and not stops:
        return None, CONTINUE
    try:
        with context.phases.during("save", progress.step):
            save = checkpointer.save_when_due(
                progress, is_last=stops, is_asked=context.requests.agreed.save
            )
    except NotFiniteError as error:
        reason = f"weights are not finite, so the step is not saved: {error}"
        context.say(f"step {progress.step}: {reason}")
        if isinstance(decision, SaveAndStop):
            raise
        return None, rolled_back(context.recipe, progress.state, 1, reason)
    return save, decision
