"""Bring a run's MLflow run up to date with its record, and keep it so.

The record is the queue: all state is in the run's directory or in MLflow, so a follower can be
killed and restarted at any time; the next one sends what is missing.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from phi4.config import recipe_from_toml
from phi4.rundir.names import CONFIG_FILE, METRICS_FILE
from phi4.track.mlflow.describer import Describer
from phi4.track.mlflow.points import POINTS_PER_BATCH, Point, PointBatch, PointPlan
from phi4.track.mlflow.record_tail import Place, RecordTail
from phi4.track.mlflow.status import Conclusion, attempt_tags, conclusion, read_attempts
from phi4.track.mlflow.store import MlflowStore, ServerRun
from phi4.track.mlflow.system_samples import SystemTail, last_samples
from phi4.track.mlflow.troubles import trouble_of
from phi4.track.record import Status

_DESCRIBE_SECONDS = 60.0


class Follower:
    """Sends a run's record to a store. Every call blocks until the store has responded.

    After any exception the store's content is read again before anything is sent.

    Args:
        run_dir: run directory of the run.
        store: the MLflow store.
        say: prints a line for the user.
        on_arrival: called with the newest step of which all points have arrived, whenever it
            changes.
        is_current: whether this follower still owns the run; checked before every batch.

    Attributes:
        arrived: the newest step of which all points have arrived; 0 before the first.
        num_points: number of points sent by this follower.
        run_id: run id of the MLflow run; empty before the first contact.
    """

    def __init__(
        self,
        run_dir: Path,
        store: MlflowStore,
        say: Callable[[str], None],
        on_arrival: Callable[[int], None] = lambda step: None,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run_dir, self._store, self._say = run_dir, store, say
        self._on_arrival, self._is_current = on_arrival, is_current
        self._tail = RecordTail(run_dir / METRICS_FILE)
        self._place = Place()
        self._plan = PointPlan({}, {})
        self._is_sure = False
        self._tags: Mapping[str, str] = {}
        self._opened = ServerRun("", "", "", {}, {})
        self._last_unix = 0.0
        self._described_at = float("-inf")
        self._describer: Describer | None = None
        self._samples = SystemTail(run_dir)
        self._told: set[str] = set()
        self.arrived = self.num_points = 0
        self.run_id = ""

    def begin(self) -> None:
        """Show that an attempt is running, and how earlier attempts ended."""
        self._make_sure()
        attempts = read_attempts(self._run_dir)
        self._set_tags(attempt_tags({n: attempts[n] for n in sorted(attempts)[:-1]}))
        if self._opened.status != "RUNNING":
            self._store.set_running(self.run_id)
        self._say(f"MLflow: {self._store.described}, run {self.run_id}")
        if page := self._opened.page(self._store.uri):
            self._say(f"MLflow: {page}")

    def catch_up(self) -> None:
        """Send what the store lacks, up to the current end of the record."""
        self._make_sure()
        while True:
            lines, place = self._tail.read(self._place)
            self._is_sure = not lines
            for batch in self._plan.batches(lines):
                if not self._is_current():
                    return
                self._send(batch)
                self._note(batch.last_step)
            self._place, self._is_sure = place, True
            if not lines:
                return
            self._note(lines[-1]["step"])
            self._last_unix = lines[-1]["unix_seconds"]

    def describe(self, *, is_last: bool = False) -> None:
        """Update everything except the points from time to time.

        Points have precedence over it: errors are reported and retried later.
        """
        now = time.monotonic()
        if not is_last and now - self._described_at < _DESCRIBE_SECONDS:
            return
        self._described_at = now
        try:
            self._described().update()
            self._described().settle()
        except Exception as error:
            trouble = trouble_of(error)
            self._tell(trouble.kind, f"the run's description is incomplete: {trouble.text}")

    def show_machines(self) -> None:
        """Send the samples of the run's machines that the store lacks."""
        self._make_sure()
        points = [
            Point(name, sample.sample, round(1000 * sample.unix_seconds), value)
            for sample in self._samples.read()
            for name, value in sample.metrics.items()
        ]
        self._is_sure = not points
        for start in range(0, len(points), POINTS_PER_BATCH):
            batch = tuple(points[start : start + POINTS_PER_BATCH])
            self._send(PointBatch({}, batch, self.arrived))
        self._is_sure = True

    def conclude(self, said: Status | None = None) -> Conclusion:
        """Set the status of a run that ended, once its points have arrived; return the status.

        Args:
            said: reported by the training process; None if it was killed or ended long ago.
        """
        found = conclusion(
            read_attempts(self._run_dir),
            said,
            has_all_steps=self.arrived >= self._num_steps(),
            last_unix=self._last_unix,
        )
        self._make_sure()
        self._set_tags(found.tags)
        self._store.set_ended(self.run_id, found.status, found.ended_unix)
        return found

    def _described(self) -> Describer:
        if self._describer is None:
            client = self._store.client
            self._describer = Describer(
                self._run_dir,
                client,
                uri=self._store.uri,
                experiment_id=self._opened.experiment_id,
                run_id=self.run_id,
            )
        return self._describer

    def _make_sure(self) -> None:
        """Read the store's content, which is unknown after a failure."""
        if self._is_sure:
            return
        opened, note = self._store.open_run()
        if note:
            self._tell(note, note)
        if opened.run_id != self.run_id:
            self.run_id, self._place, self.arrived = opened.run_id, Place(), 0
            self._plan = PointPlan(opened.held, opened.tags)
            self._described_at, self._describer = float("-inf"), None
        else:
            self._plan.learn(opened.held, opened.tags)
        self._samples = SystemTail(self._run_dir, last_samples(opened.held))
        self._opened, self._tags = opened, opened.tags
        self._is_sure = True

    def _send(self, batch: PointBatch) -> None:
        refused = self._store.send(self.run_id, batch)
        self.num_points += len(batch.points)
        for name, reason in refused.items():
            self._tell(name, f"the metric {name!r} is refused and skipped: {reason}")

    def _note(self, step: int) -> None:
        if step > 0 and step != self.arrived:
            self.arrived = step
            self._on_arrival(step)

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        new = {key: text for key, text in tags.items() if self._tags.get(key) != text}
        if new:
            self._store.set_tags(self.run_id, new)
            self._tags = {**self._tags, **new}

    def _num_steps(self) -> int:
        config = self._run_dir / CONFIG_FILE
        return recipe_from_toml(config.read_text(encoding="utf-8"), where=str(config)).run.steps

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._say(f"MLflow at {self._store.uri}: {text}")
