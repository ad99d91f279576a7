"""Which windows of the recipe are still ahead of a state."""

import pytest

from phi4.rundir.state import RunState, Skip
from phi4.train.reliability.skipped_windows import REASON, rows_due
from tests.support.engines import tiny_recipe

RECIPE = tiny_recipe("data.skip_windows=[[0, 8], [4, 16]]")


def skip(after_step: int, last_undone: int, reason: str) -> Skip:
    return Skip(after_step, last_undone, 8, 8, reason)


@pytest.mark.parametrize(
    ("step", "skips", "rows"),
    [
        (0, (), 8),
        (4, (), 16),
        (3, (), 0),
        (4, (skip(0, 0, REASON),), 16),
        # Taken, then rolled back to the step where it begins.
        (4, (skip(4, 4, REASON), skip(4, 6, "spike")), 0),
        # A roll back from step 5 or later skipped the window with the rest.
        (4, (skip(2, 5, "spike"),), 0),
        # One from step 4 or before never came to it.
        (4, (skip(2, 4, "spike"),), 16),
    ],
)
def test_window_is_due_once(step: int, skips: tuple[Skip, ...], rows: int) -> None:
    assert rows_due(RECIPE, RunState(step=step, skips=skips)) == rows
