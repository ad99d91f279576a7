"""Tracking of a run in MLflow by a separate process: points, description, lineage, models."""

from phi4.track.mlflow.offline import replay, send_file, settle
from phi4.track.mlflow.recipe_view import recipe_params
from phi4.track.mlflow.tracker import MlflowTracker
from phi4.track.mlflow.wish import TrackingWish, wish_of

__all__ = [
    "MlflowTracker",
    "TrackingWish",
    "recipe_params",
    "replay",
    "send_file",
    "settle",
    "wish_of",
]
