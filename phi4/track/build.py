"""From a recipe to its trackers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi4.config import Recipe
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import StepLog
from phi4.track.console import ConsoleTracker
from phi4.track.mlflow import MlflowTracker
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
    record = StepLog(run_dir / METRICS_FILE, resume_step, say)
    views: list[Tracker] = [console]
    if tracking.mlflow:
        mlflow = MlflowTracker(
            run_dir,
            uri=tracking.uri,
            experiment=tracking.experiment,
            run_name=run.name or run_dir.resolve().name,
            resume_step=resume_step,
            say=say,
        )
        views.append(mlflow)
    return Trackers(record, views, say)


def recipe_params(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe by its dotted name; tables and lists as JSON text."""
    tree = recipe.model_dump(mode="json")
    return {
        f"{section}.{key}": json.dumps(value) if isinstance(value, list | dict) else value
        for section, table in tree.items()
        for key, value in table.items()
    }
