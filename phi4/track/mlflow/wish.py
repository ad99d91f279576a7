"""The MLflow settings of a run, before environment variables and defaults are applied."""

from pathlib import Path

import msgspec

from phi4.config import Recipe


class TrackingWish(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run is to be tracked.

    Attributes:
        run_dir: run directory of the run, absolute.
        uri: address of the server or store; None takes MLFLOW_TRACKING_URI, else a sqlite store
            next to run_dir.
        experiment: None takes MLFLOW_EXPERIMENT_NAME, else `phi4`.
        run_name: name of a new MLflow run.
    """

    run_dir: str
    uri: str | None = None
    experiment: str | None = None
    run_name: str = ""


def wish_of(recipe: Recipe, run_dir: Path) -> TrackingWish:
    """Return the settings of a recipe."""
    run_dir = run_dir.resolve()
    return TrackingWish(
        run_dir=str(run_dir),
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        run_name=recipe.run.name or run_dir.name,
    )
