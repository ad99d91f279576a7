"""The interface of a tracker, and the combination of several into one.

metrics.jsonl is the record and the other trackers are views of it. An error of the record stops
training, because a run without a record is worthless; an error of a view is reported once, and
training continues without that view.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "interrupted"]


class Tracker(Protocol):
    """Follows one run, on the writer rank."""

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """Called once, before the first step: the flat recipe, and files to keep with the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called once per step, steps increasing; an evaluation's results are among its step's
        metrics."""

    def rewind(self, step: int) -> None:
        """Called when the run was rolled back: the steps after this one are undone and repeated."""

    def finish(self, status: Status) -> None:
        """Called once, at the end, however the run ended."""


class Trackers:
    """The record and its views as one tracker; on other ranks it has none and does nothing."""

    def __init__(
        self, record: Tracker | None, views: Sequence[Tracker], say: Callable[[str], None]
    ) -> None:
        self._record = record
        self._views = list(views)
        self._say = say

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path] = ()) -> None:
        """Start all."""
        if self._record:
            self._record.start(params, artifacts)
        self._show(lambda view: view.start(params, artifacts))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to the record, then to the views."""
        if self._record:
            self._record.log(step, metrics)
        self._show(lambda view: view.log(step, metrics))

    def rewind(self, step: int) -> None:
        """Cut the record, then rewind the views."""
        if self._record:
            self._record.rewind(step)
        self._show(lambda view: view.rewind(step))

    def finish(self, status: Status) -> None:
        """Finish all; the views even if the record fails."""
        try:
            if self._record:
                self._record.finish(status)
        finally:
            self._show(lambda view: view.finish(status))

    def _show(self, what: Callable[[Tracker], None]) -> None:
        for view in tuple(self._views):
            try:
                what(view)
            except Exception as error:
                self._views.remove(view)
                name = type(view).__name__
                self._say(
                    f"{name} failed and is disabled from now on; metrics.jsonl has everything "
                    f"({type(error).__name__}: {error})"
                )
