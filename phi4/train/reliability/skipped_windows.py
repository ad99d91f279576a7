"""Data that the recipe skips: `data.skip_windows`, rows after a step that no step trains on."""

import msgspec

from phi4.config import Recipe
from phi4.data.stream.loader import Loader
from phi4.rundir.state import RunState, Skip

REASON = "data.skip_windows"


def behind_window(recipe: Recipe, loader: Loader, state: RunState) -> RunState:
    """The state before the next step, moved past the window that begins there, if any.

    Args:
        recipe: names the windows.
        loader: at the position of the state; is moved too.
        state: between two steps.
    """
    rows = rows_due(recipe, state)
    if not rows:
        return state
    loader.skip(rows)
    row_units = recipe.data.sequence_length // recipe.data.unit_tokens
    skip = Skip(
        after_step=state.step,
        last_undone=state.step,
        units=rows * row_units,
        rows=rows,
        reason=REASON,
    )
    return msgspec.structs.replace(state, data=loader.state(), skips=(*state.skips, skip))


def rows_due(recipe: Recipe, state: RunState) -> int:
    """Rows of the window that begins after a state's step and was not skipped yet.

    It was skipped if the state lists it, or if a rollback skipped all data up to a later step.
    """
    rows = dict(recipe.data.skip_windows).get(state.step, 0)
    is_behind = any(
        (skip.after_step == state.step and skip.reason == REASON)
        or skip.after_step < state.step < skip.last_undone
        for skip in state.skips
    )
    return 0 if is_behind else rows
