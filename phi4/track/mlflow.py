"""MLflow: a view of the run, filled by a thread of its own.

One decision: nothing here can hold up a step. `log` puts the step into a bounded queue and returns;
importing mlflow, opening the store and sending happen in the thread, which tries again for as long
as the run lasts. What does not arrive is counted and said; metrics.jsonl has it, and a run that is
resumed first sends what its MLflow run lacks. The only file that imports mlflow, and that lazily.
"""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from phi4.rundir.names import METRICS_FILE, MLFLOW_ID_FILE
from phi4.rundir.step_log import read_metrics
from phi4.track.record import Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

_QUEUED_STEPS = 10_000
_BATCH_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 30.0


class _Point(NamedTuple):
    step: int
    time_ms: int
    metrics: Mapping[str, float]


class MlflowTracker:
    """Shows a run in MLflow, the same MLflow run across restarts; a `Tracker`.

    Args:
        run_dir: holds metrics.jsonl and the id of the MLflow run.
        uri: tracking server or store; None is a sqlite store beside run_dir, artifacts beside it.
        experiment: created when it does not exist.
        run_name: of a new MLflow run.
        resume_step: completed steps of the run.
        say: takes a line for the user; called from the thread.
        patience_seconds: how long `finish` waits for what is still to be sent.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        resume_step: int,
        say: Callable[[str], None],
        patience_seconds: float = 30.0,
    ) -> None:
        self._run_dir = run_dir.resolve()
        self._local = uri is None
        self._uri = uri or f"sqlite:///{self._run_dir.parent / 'mlflow.db'}"
        self._experiment = experiment
        self._run_name = run_name
        self._resume_step = resume_step
        self._resumed_at_ms = _now_ms()
        self._say = say
        self._patience_seconds = patience_seconds
        self._queue: queue.Queue[_Point] = queue.Queue(_QUEUED_STEPS)
        self._num_logged = self._num_sent = 0
        self._status: Status = "failed"
        self._ending = threading.Event()
        self._complained = False
        self._thread: threading.Thread | None = None

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """Begin opening the MLflow run; parameters that changed since it began become tags."""
        work = (dict(params), tuple(artifacts))
        self._thread = threading.Thread(target=self._work, args=work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue a step; drop it when the queue is full."""
        self._num_logged += 1
        try:
            self._queue.put_nowait(_Point(step, _now_ms(), dict(metrics)))
        except queue.Full:
            self._complain("it takes no more steps")

    def rewind(self, step: int) -> None:
        """Nothing: MLflow cannot forget a point.

        It keeps those of undone steps and shows the later ones of the same steps beside them;
        `rolled_back_from` of the next step tells where that begins.
        """

    def finish(self, status: Status) -> None:
        """Send what is left and set the run's status, waiting no longer than the patience."""
        self._status = status
        self._ending.set()
        if self._thread:
            self._thread.join(self._patience_seconds)
            if self._num_sent < self._num_logged:
                self._say(
                    f"MLflow got {self._num_sent} of {self._num_logged} steps; "
                    f"{self._run_dir / METRICS_FILE} has them all, and a resumed run sends the rest"
                )

    def _work(self, params: dict[str, Any], artifacts: tuple[Path, ...]) -> None:
        run = self._insist(lambda: self._open(params, artifacts))
        if run is None:
            return
        for points in self._batches():
            if self._insist(lambda points=points: run.log(points)):
                self._num_sent += len(points)
        self._insist(lambda: run.close(self._status))

    def _insist(self, action: Callable[[], Any]) -> Any:
        """The action's result, however often it takes; None when it fails as the run ends."""
        wait_seconds = 1.0
        while True:
            is_last_try = self._ending.is_set()
            try:
                return action()
            except Exception as error:
                self._complain(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            if is_last_try:
                return None
            self._ending.wait(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_RETRY_SECONDS)

    def _batches(self) -> Iterator[list[_Point]]:
        while not (self._ending.is_set() and self._queue.empty()):
            # Few large transactions take less of the trainer's time than many small ones.
            self._ending.wait(_BATCH_SECONDS)
            if num_points := self._queue.qsize():
                yield [self._queue.get() for _ in range(num_points)]

    def _complain(self, reason: str) -> None:
        if not self._complained:
            self._complained = True
            text = f"MLflow at {self._uri}: {reason}; training goes on and it is tried again"
            # mlflow repeats the address, password included, in its own messages.
            self._say(re.sub(r"//[^/@\s]*@", "//", text))

    def _open(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> "_MlflowRun":
        client = _connect(self._uri)
        run = self._known_run(client)
        if run:
            client.update_run(run.run_id, status="RUNNING")
        else:
            created = client.create_run(self._experiment_id(client), run_name=self._run_name)
            run = _MlflowRun(client, created.info.run_id)
            (self._run_dir / MLFLOW_ID_FILE).write_text(run.run_id, encoding="utf-8")
        run.describe(params)
        for path in artifacts:
            client.log_artifact(run.run_id, str(path))
        if self._resume_step:
            lacking = run.lacking(self._run_dir / METRICS_FILE, self._resume_step)
            # Dated before the steps to come, so that the history is in order.
            run.log([_Point(step, self._resumed_at_ms, metrics) for step, metrics in lacking])
        return run

    def _known_run(self, client: "MlflowClient") -> "_MlflowRun | None":
        """The MLflow run that an earlier start of this run made."""
        from mlflow.exceptions import MlflowException

        try:
            run_id = (self._run_dir / MLFLOW_ID_FILE).read_text(encoding="utf-8")
            info = client.get_run(run_id).info
        except FileNotFoundError:
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return _MlflowRun(client, run_id) if info.lifecycle_stage == "active" else None

    def _experiment_id(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        # Artifacts of the local store would otherwise go below the working directory.
        artifacts = (self._run_dir.parent / "mlartifacts").as_uri() if self._local else None
        try:
            return client.create_experiment(self._experiment, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                raise
            return found.experiment_id


class _MlflowRun:
    """A run in the store. Every call blocks, and raises when the store is out of reach."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def describe(self, params: Mapping[str, Any]) -> None:
        """Set the parameters; in a run that has some, new and changed ones become tags."""
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import (
            MAX_PARAM_VAL_LENGTH,
            MAX_PARAMS_TAGS_PER_BATCH,
            MAX_TAG_VAL_LENGTH,
        )

        texts = {_name(key): str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in params.items()}
        known = self._client.get_run(self.run_id).data.params
        changed = {key: text for key, text in texts.items() if known.get(key) != text}
        if known:
            tags = [RunTag(f"resumed.{k}", v[:MAX_TAG_VAL_LENGTH]) for k, v in changed.items()]
            for some in _slices(tags, MAX_PARAMS_TAGS_PER_BATCH):
                self._client.log_batch(self.run_id, tags=some)
        else:
            for some in _slices([Param(k, v) for k, v in texts.items()], MAX_PARAMS_TAGS_PER_BATCH):
                self._client.log_batch(self.run_id, params=some)

    def log(self, points: Sequence[_Point]) -> bool:
        """Send steps. Sending one again does no harm: equal points are stored once."""
        from mlflow.entities import Metric
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH

        metrics = [
            Metric(_name(key), value, point.time_ms, point.step)
            for point in points
            for key, value in point.metrics.items()
        ]
        for some in _slices(metrics, MAX_METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=some)
        return True

    def lacking(self, record: Path, last_step: int) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Steps of a metrics.jsonl, up to the last, that never arrived here."""

        @cache
        def arrived(key: str) -> set[int]:
            return {m.step for m in self._client.get_metric_history(self.run_id, _name(key))}

        for metrics in read_metrics(record):
            step = int(metrics.pop("step"))
            # The metrics of a step are sent together, so the first one stands for all.
            if metrics and step <= last_step and step not in arrived(next(iter(metrics))):
                yield step, metrics

    def close(self, status: Status) -> None:
        """End the run as what it was."""
        self._client.set_terminated(self.run_id, status=_STATUS[status])


def _connect(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient
    from mlflow.environment_variables import (
        MLFLOW_DISABLE_TELEMETRY,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
    )
    from mlflow.telemetry import set_telemetry_client

    # These settings of mlflow are environment variables and nothing else. Its usage reports are
    # off because a training machine calls nobody unasked; the limits, because this thread tries
    # again by itself, and a user who sets them is obeyed.
    MLFLOW_DISABLE_TELEMETRY.set(True)
    set_telemetry_client()
    for setting, value in ((MLFLOW_HTTP_REQUEST_MAX_RETRIES, 1), (MLFLOW_HTTP_REQUEST_TIMEOUT, 10)):
        if not setting.is_set():
            setting.set(value)
    # Creating a store tells of every table.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _name(key: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", key)[:250]


def _slices(items: list, length: int) -> Iterator[list]:
    return (items[start : start + length] for start in range(0, len(items), length))
