"""Determine which points MLflow lacks, from the lines of metrics.jsonl and MLflow's own content.

MLflow never overwrites or deletes a point. Points are therefore sent in step order, and for each
name only those after the greatest step that MLflow has under it. A step that is repeated after a
kill is sent once, regardless of network failures and of which process sends it.

After a rollback, the steps that MLflow already has differ from those of the record. Their
replacements go to `after_rollback_<n>/<name>`. The range of these steps is stored in a tag before
the first of them is sent, so that a later sender makes the same decision.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

POINTS_PER_BATCH = 1000
"""MLflow's limit of a request."""

SYSTEM_PREFIX = "system/"
"""Prefix of names whose steps are sample numbers, not training steps."""

_ROLLBACK = "after_rollback_"
_TAG = "rollback_"
_NO_METRICS = {"step", "unix_seconds", "attempt"}
_LONGEST_NAME = 200
"""MLflow allows 250 characters, the prefix included."""


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    step: int
    time_ms: int
    value: float


class PointBatch(NamedTuple):
    """A request: either tags or points.

    Attributes:
        tags: to be set before the following points are sent.
        points: points of complete steps, unless one step alone is too large.
        last_step: once this batch has arrived, all points up to this step have.
    """

    tags: Mapping[str, str]
    points: tuple[Point, ...]
    last_step: int


class Replaced(NamedTuple):
    """Steps of a rollback whose points MLflow already had; none if `last` is before `first`.

    Attributes:
        number: number of the rollback. A run that later had to return to an even older checkpoint
            has two of the same number, the second with an earlier first step.
        first: the first step after the rollback.
        last: the greatest step that MLflow had.
    """

    number: int
    first: int
    last: int

    @property
    def text(self) -> str:
        """The tag's value."""
        if self.last < self.first:
            return f"from step {self.first}; none of them had been sent"
        return f"steps {self.first} to {self.last}"


class PointPlan:
    """Turns lines of a record into batches, given MLflow's content of the run.

    Args:
        held: greatest step by name.
        tags: tags of the run.
    """

    def __init__(self, held: Mapping[str, int], tags: Mapping[str, str]) -> None:
        self._names: set[str] = set()
        """Names of the record's metrics; MLflow may have others, from other writers."""
        self.learn(held, tags)

    def learn(self, held: Mapping[str, int], tags: Mapping[str, str]) -> None:
        """Adopt the content that MLflow reports."""
        self._held = dict(held)
        self._replaced = dict(_replaced_steps(tags))

    def batches(
        self, lines: Iterable[Mapping[str, Any]], size: int = POINTS_PER_BATCH
    ) -> Iterator[PointBatch]:
        """Yield what is to be sent of these lines, in order.

        Yielded batches count as arrived; after a failure call `learn` before continuing.

        Args:
            lines: accepted steps, increasing.
            size: most points of a batch.
        """
        points: list[Point] = []
        last_step = -1
        for line in lines:
            tags, new = self._take(line)
            is_full = len(points) + len(new) > size
            if points and (tags or is_full):
                yield PointBatch({}, tuple(points), last_step)
                points = []
            if tags:
                yield PointBatch(tags, (), last_step)
            while len(new) > size:
                yield PointBatch({}, tuple(new[:size]), last_step)
                new = new[size:]
            points += new
            last_step = line["step"]
        if points:
            yield PointBatch({}, tuple(points), last_step)

    def _take(self, line: Mapping[str, Any]) -> tuple[dict[str, str], list[Point]]:
        """Return tags to be set before this line, and its points."""
        step = line["step"]
        metrics = {metric_name(key): line[key] for key in line if key not in _NO_METRICS}
        self._names |= metrics.keys()
        tags = self._replacing(line) if "rolled_back_from" in line else {}
        prefix, points = self._prefix(step), []
        for name, value in metrics.items():
            if step > self._held.get(prefix + name, -1):
                self._held[prefix + name] = step
                time_ms = round(line["unix_seconds"] * 1000)
                points.append(Point(prefix + name, step, time_ms, metric_value(value)))
        return tags, points

    def _replacing(self, line: Mapping[str, Any]) -> dict[str, str]:
        """Return the tag of a rollback that MLflow does not have yet; decides which steps it
        replaces."""
        number, first = int(line.get("roll_backs", 0)), line["step"]
        label = str(number)
        known = self._replaced.get(label)
        if known is not None and known.first != first:
            label = f"{number}_from_{first}"
        if label in self._replaced:
            return {}
        last = max(self._held.get(name, -1) for name in self._names)
        self._replaced[label] = Replaced(number, first, last)
        return {f"{_TAG}{label}": self._replaced[label].text}

    def _prefix(self, step: int) -> str:
        """Return the prefix of a step's points: that of the newest rollback that replaces it, if
        any."""
        replacing = [
            (replaced.number, -replaced.first, label)
            for label, replaced in self._replaced.items()
            if replaced.first <= step <= replaced.last
        ]
        return f"{_ROLLBACK}{max(replacing)[2]}/" if replacing else ""


def metric_name(key: str) -> str:
    """Return a valid MLflow metric name.

    Other characters become `_`; a changed name ends with a hash of the key, so that names stay
    unique.
    """
    parts = re.sub(r"[^\w\-. :/]", "_", key).split("/")
    name = "/".join(part for part in parts if part not in ("", ".", ".."))
    name = re.sub(r"^\.\.", "__", name)
    if name.startswith((SYSTEM_PREFIX, _ROLLBACK)):
        name = f"_{name}"
    if name == key and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(key.encode()).hexdigest()[:6]
    return f"{name[: _LONGEST_NAME - 7]}-{digest}"


def metric_value(value: float) -> float:
    """Return NaN for values that are not finite: MLflow stores it, and would draw infinity as
    1.8e308."""
    return float(value) if math.isfinite(value) else math.nan


def _replaced_steps(tags: Mapping[str, str]) -> Iterator[tuple[str, Replaced]]:
    """Return the rollbacks that MLflow knows, by label."""
    for key, text in tags.items():
        label = re.fullmatch(rf"{_TAG}((\d+)(?:_from_\d+)?)", key)
        some = re.fullmatch(r"steps (\d+) to (\d+)", text)
        none = re.match(r"from step (\d+);", text)
        found = some or none
        if label and found:
            first = int(found.group(1))
            last = int(some.group(2)) if some else first - 1
            yield label.group(1), Replaced(int(label.group(2)), first, last)
