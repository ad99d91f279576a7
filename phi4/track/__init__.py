"""Tracking of a run: metrics.jsonl is the record; the console and MLflow are views of it."""

from phi4.track.build import open_trackers
from phi4.track.console import ConsoleTracker
from phi4.track.mlflow import MlflowTracker, recipe_params
from phi4.track.plot import Bars, draw_bars, draw_losses
from phi4.track.record import Status, Tracker, Trackers

__all__ = [
    "Bars",
    "ConsoleTracker",
    "MlflowTracker",
    "Status",
    "Tracker",
    "Trackers",
    "draw_bars",
    "draw_losses",
    "open_trackers",
    "recipe_params",
]
