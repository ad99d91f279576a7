"""What a run asks of MLflow, before the environment and the defaults are looked at."""

from pathlib import Path

import msgspec

from phi4.config import Recipe


class TrackingWish(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run is to be shown.

    Attributes:
        run_dir: of the run, absolute.
        uri: of the server or store; None takes MLFLOW_TRACKING_URI, else a sqlite store beside
            run_dir.
        experiment: None takes MLFLOW_EXPERIMENT_NAME, else `phi4`.
        run_name: of a new MLflow run.
    """

    run_dir: str
    uri: str | None = None
    experiment: str | None = None
    run_name: str = ""


def wish_of(recipe: Recipe, run_dir: Path) -> TrackingWish:
    """What a recipe asks for."""
    run_dir = run_dir.resolve()
    return TrackingWish(
        run_dir=str(run_dir),
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        run_name=recipe.run.name or run_dir.name,
    )
