"""Make the trackers of a recipe."""

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
    """Open the trackers that a recipe configures.

    Args:
        recipe: gives the run directory and the tracking server.
        resume_step: completed steps; later lines of metrics.jsonl are removed now.
        is_writer: True on one rank; on the others the trackers do nothing.
        say: prints lines for the user; the console's own if None.

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
