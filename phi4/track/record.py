"""What a tracker is, and how several become one.

One decision: metrics.jsonl is the record and the rest are views of it. An error of the record stops
training, because a run without a record is worth nothing; an error of a view is said once, and
training goes on without that view.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "interrupted"]


class Tracker(Protocol):
    """Follows one run, on the one rank that writes."""

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """Once, before the first step: the flat recipe, and files to keep with the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Once per step, steps increasing; an evaluation's results are among its step's metrics."""

    def rewind(self, step: int) -> None:
        """The run was rolled back: the steps after this one are undone and happen again."""

    def finish(self, status: Status) -> None:
        """Once, at the end, however the run ended."""


class Trackers:
    """The record and its views as one tracker; without any it follows silently (other ranks)."""

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
        """Cut the record, then tell the views."""
        if self._record:
            self._record.rewind(step)
        self._show(lambda view: view.rewind(step))

    def finish(self, status: Status) -> None:
        """Finish all; the views also when the record fails."""
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
                    f"{name} failed and is left out from here on; metrics.jsonl has everything "
                    f"({type(error).__name__}: {error})"
                )
