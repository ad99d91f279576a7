"""Access to the MLflow server or store that tracks a run.

Every call blocks until the server responds and raises on failure, without retries. After a failure
only the server knows what it has stored.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from phi4.errors import Phi4Error, TrackingError
from phi4.rundir.about import abouts_of_training
from phi4.rundir.attempts import attempt_path, read_attempt
from phi4.rundir.mlflow_ids import MlflowIds, read_mlflow_ids, write_mlflow_ids
from phi4.track.mlflow.address import chosen_uri, connect, first_set, local_uri, require_address
from phi4.track.mlflow.points import Point, PointBatch
from phi4.track.mlflow.troubles import without_password
from phi4.track.mlflow.wish import TrackingWish

if TYPE_CHECKING:
    from mlflow.entities import Run

_KEY_TAG = "phi4.run"
_TAGS_PER_BATCH = 100


class ServerRun(NamedTuple):
    """The server's content of a run.

    Attributes:
        run_id: run id of the MLflow run.
        experiment_id: its experiment.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        held: greatest step by name of the metric.
        tags: tags of the MLflow run.
    """

    run_id: str
    experiment_id: str
    status: str
    held: Mapping[str, int]
    tags: Mapping[str, str]

    def page(self, uri: str) -> str:
        """URL of the run in a browser; empty for a store without a server.

        MLflow 3.17 opens a page in the mode that the browser used last, initially for generative
        AI, where training runs are listed among evaluations, unless the URL specifies the mode.
        """
        if not uri.startswith(("http://", "https://")):
            return ""
        place = f"#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{uri.rstrip('/')}/{place}?workflowType=machine_learning"


class MlflowStore:
    """A tracking server or store, and the MLflow run in it that tracks a run of ours.

    Args:
        wish: where the run is to be tracked.
        is_training: whether MLFLOW_RUN_ID selects the MLflow run, and mlflow.json is written.

    Attributes:
        uri: address of the server, without a password.
        described: origins of the chosen settings, for the user.

    Raises:
        TrackingError: the address is invalid.
    """

    def __init__(self, wish: TrackingWish, *, is_training: bool) -> None:
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID

        self._wish, self._is_training = wish, is_training
        self._run_dir = Path(wish.run_dir)
        uri, uri_from = chosen_uri(wish)
        self._experiment, experiment_from = first_set(
            (wish.experiment, "tracking.experiment"),
            (MLFLOW_EXPERIMENT_NAME.get(), "MLFLOW_EXPERIMENT_NAME"),
            ("phi4", "the default"),
        )
        self._asked_run_id = MLFLOW_RUN_ID.get() if is_training else None
        self._is_local = uri == local_uri(wish)
        self.uri = without_password(uri)
        self.described = f"{self.uri} ({uri_from}), " + (
            f"run {self._asked_run_id} (MLFLOW_RUN_ID)"
            if self._asked_run_id
            else f"experiment {self._experiment} ({experiment_from})"
        )
        require_address(uri, self.uri, uri_from)
        self.client = connect(uri)

    def open_run(self) -> tuple[ServerRun, str]:
        """Return the MLflow run of this run, created if missing, and a line for the user, or "".

        Raises:
            TrackingError: it cannot be created or used; the message has the reason.
        """
        if self._asked_run_id:
            run = self._run(self._asked_run_id)
            if run is None or not _is_active(run):
                raise TrackingError(
                    f"MLFLOW_RUN_ID={self._asked_run_id}: {self.uri} "
                    f"{'has no such run' if run is None else 'has this run as a deleted one'}, "
                    "expected an existing run; unset the variable, or set it to another run"
                )
            return self._opened(run), ""
        known, note = read_mlflow_ids(self._run_dir), ""
        if known is not None and known.uri == self.uri:
            run = self._run(known.run_id)
            if known.first_attempt != self._first_attempt():
                self._give_up(run)
                note = (
                    f"run {known.run_id} belongs to an earlier training in {self._run_dir}; it is "
                    f"closed"
                )
            elif run is not None and _is_active(run):
                return self._opened(run), ""
            else:
                how = "no longer exists" if run is None else "is deleted"
                note = (
                    f"run {known.run_id} {how}, expected the run of {self._run_dir}; a new one "
                    f"with all steps is created. To keep a deleted run, restore it with `mlflow "
                    f"runs restore` before the start"
                )
        experiment_id = self._experiment_id()
        return self._opened(self._found(experiment_id) or self._created(experiment_id)), note

    def send(self, run_id: str, batch: PointBatch) -> dict[str, str]:
        """Send a batch.

        Returns:
            Names that the server refused, with its reason; everything else has arrived.
        """
        from mlflow.exceptions import MlflowException

        if batch.tags:
            self.set_tags(run_id, batch.tags)
            return {}
        try:
            self._log(run_id, batch.points)
        except MlflowException as error:
            is_refused = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
            if not is_refused or not _is_active(self.client.get_run(run_id)):
                raise
        else:
            return {}
        refused = {}
        for name in dict.fromkeys(point.name for point in batch.points):
            try:
                self._log(run_id, [point for point in batch.points if point.name == name])
            except MlflowException as error:
                if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                    raise
                refused[name] = str(error).partition("\n")[0]
        return refused

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; a value that is too long is truncated and marked."""
        from mlflow.entities import RunTag
        from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

        entities = [RunTag(key, cut(text, MAX_TAG_VAL_LENGTH)) for key, text in tags.items()]
        for start in range(0, len(entities), _TAGS_PER_BATCH):
            self.client.log_batch(run_id, tags=entities[start : start + _TAGS_PER_BATCH])

    def set_running(self, run_id: str) -> None:
        """Mark the run as running."""
        self.client.update_run(run_id, status="RUNNING")

    def set_ended(self, run_id: str, status: str, ended_unix: float) -> None:
        """Set the run's final status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status=status, end_time=round(ended_unix * 1000))

    def _log(self, run_id: str, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        self.client.log_batch(run_id, metrics=metrics)

    def _run(self, run_id: str) -> "Run | None":
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            # Artifacts of the local store would otherwise be written below the working directory.
            artifacts = (self._run_dir.parent / "mlartifacts").as_uri() if self._is_local else None
            try:
                return self.client.create_experiment(self._experiment, artifact_location=artifacts)
            except MlflowException:
                # Another run created it meanwhile.
                found = self.client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {self._experiment!r} is deleted, expected an active one; restore it "
                f"(mlflow experiments restore --experiment-id {found.experiment_id}) or set "
                f"another tracking.experiment"
            )
        return found.experiment_id

    def _found(self, experiment_id: str) -> "Run | None":
        """Find the run whose creation was not acknowledged, or that another replay created."""
        query = f"tags.`{_KEY_TAG}` = '{self._key()}'"
        runs = self.client.search_runs([experiment_id], query, max_results=1)
        return runs[0] if runs else None

    def _give_up(self, run: "Run | None") -> None:
        """Close the run of a training that was replaced by a new one with another recipe."""
        if run is not None and _is_active(run) and run.info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, status="KILLED")

    def _first_attempt(self) -> int:
        """Return the first attempt of the training that the run tracks."""
        return next((about.attempt for about in abouts_of_training(self._run_dir)), 1)

    def _created(self, experiment_id: str) -> "Run":
        first = read_attempt(attempt_path(self._run_dir, self._first_attempt()))
        started_ms = round(first.started_unix * 1000) if first else 0
        return self.client.create_run(
            experiment_id,
            start_time=started_ms or None,
            tags={_KEY_TAG: self._key()},
            run_name=self._wish.run_name,
        )

    def _key(self) -> str:
        """Return the run's key: a hash of its training's first attempt, constant while that
        continues."""
        number = self._first_attempt()
        first = read_attempt(attempt_path(self._run_dir, number))
        named = msgspec.json.encode((number, first.process, first.started_at)) if first else b""
        return hashlib.sha256(named or str(self._run_dir).encode()).hexdigest()[:32]

    def _opened(self, run: "Run") -> ServerRun:
        known = read_mlflow_ids(self._run_dir)
        ids = MlflowIds(
            uri=self.uri,
            experiment_id=run.info.experiment_id,
            run_id=run.info.run_id,
            first_attempt=self._first_attempt(),
        )
        if known is not None and known.uri == ids.uri:
            ids = msgspec.structs.replace(ids, parent_run_id=known.parent_run_id)
        if ids != known and (self._is_training or known is None):
            # With a full disk the run is found again by its key.
            with suppress(OSError, Phi4Error):
                write_mlflow_ids(self._run_dir, ids)
        return _server_run(run)


def cut(text: str, length: int) -> str:
    """Truncate a text to `length` characters, with a note about the missing part."""
    if len(text) <= length:
        return text
    mark = f"... (cut; {len(text):,} characters)"
    return text[: length - len(mark)] + mark


def _is_active(run: "Run") -> bool:
    return run.info.lifecycle_stage == "active"


def _server_run(run: "Run") -> ServerRun:
    # MLflow's latest value of a metric is the one with the greatest step.
    held = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    info = run.info
    return ServerRun(info.run_id, info.experiment_id, info.status, held, run.data.tags)
