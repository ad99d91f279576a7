"""From a recipe to its trackers."""

from collections.abc import Callable
from pathlib import Path

from phi4.config import Recipe
from phi4.rundir.names import METRICS_FILE, UNDONE_FILE
from phi4.rundir.step_log import StepLog
from phi4.track.console import ConsoleTracker
from phi4.track.mlflow import MlflowTracker, wish_of
from phi4.track.record import Tracker, Trackers


def open_trackers(
    recipe: Recipe,
    *,
    resume_step: int,
    is_writer: bool,
    say: Callable[[str], None] | None = None,
) -> Trackers:
    """The trackers that a recipe asks for.

    Args:
        recipe: names the run directory and the tracking server.
        resume_step: completed steps; what metrics.jsonl holds of later ones is removed now.
        is_writer: true on one rank; on the others the result follows silently.
        say: takes the lines for the user; the console's own when None.

    Raises:
        DataError: metrics.jsonl of the run is damaged.
    """
    run, tracking = recipe.run, recipe.tracking
    if not is_writer:
        return Trackers(None, [], print)
    run_dir = Path(run.dir)
    console = ConsoleTracker(run.steps, resume_step)
    say = say or console.say
    record = StepLog(run_dir / METRICS_FILE, resume_step, say, undone=run_dir / UNDONE_FILE)
    views: list[Tracker] = [console]
    if tracking.mlflow:
        views.append(MlflowTracker(wish_of(recipe, run_dir), say))
    return Trackers(record, views, say)
