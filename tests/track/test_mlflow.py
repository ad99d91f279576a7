"""The MLflow view, read back by MLflow's own client, and with servers that do not answer."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from phi4.rundir.step_log import StepLog
from phi4.track import MlflowTracker
from tests.support.waiting import LONG_SECONDS

PARAMS = {"run.seed": 1, "optim.learning_rate": 3e-4, "run.name": None, "data.sources": "x" * 9000}


def follow(run_dir: Path, steps: range, status: str, *, params=PARAMS, **options) -> list[str]:
    """A run as the loop would drive it; gives what was said."""
    said: list[str] = []
    settings = {"uri": None, "experiment": "tests", "run_name": "a run", "resume_step": 0}
    settings |= {"patience_seconds": LONG_SECONDS, **options}
    tracker = MlflowTracker(run_dir, say=said.append, **settings)
    recipe = run_dir / "config.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text("[run]\nseed = 1\n")
    record = StepLog(run_dir / "metrics.jsonl", settings["resume_step"])
    tracker.start(params, [recipe])
    for step in steps:
        metrics = {"loss": 1 / step, "held_out_loss/a b:c": 2.0}
        record.log(step, metrics)
        tracker.log(step, metrics)
    tracker.finish(status)
    record.finish(status)
    return said


class Store:
    """What a reader of the local store sees of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.client = mlflow.MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
        self.run_id = (run_dir / "mlflow_run_id").read_text()
        self.run = self.client.get_run(self.run_id)

    def history(self, key: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(self.run_id, key)]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    # More than one request's worth of metrics.
    assert follow(run_dir, range(1, 601), "failed") == []
    return run_dir


def test_store_has_params_metrics_artifact_and_status(first_run):
    store = Store(first_run)
    assert store.run.data.params == {
        "run.seed": "1",
        "optim.learning_rate": "0.0003",
        "run.name": "None",
        "data.sources": "x" * 6000,
    }
    assert store.history("loss") == [(step, 1 / step) for step in range(1, 601)]
    assert len(store.history("held_out_loss/a b_c")) == 600
    assert (store.run.info.status, store.run.info.run_name) == ("FAILED", "a run")
    (artifact,) = store.client.list_artifacts(store.run_id)
    copy = store.client.download_artifacts(store.run_id, artifact.path, str(first_run))
    assert Path(copy).read_text() == "[run]\nseed = 1\n"
    assert store.run.info.artifact_uri.startswith((first_run.parent / "mlartifacts").as_uri())


def test_restart_continues_the_run_and_sends_what_it_lacks(first_run):
    run_dir = first_run.parent / "restarted"
    follow(run_dir, range(1, 4), "interrupted")
    before = Store(run_dir)
    assert before.run.info.status == "KILLED"
    # Steps 4 and 5 were recorded by an attempt that was killed before it sent them.
    record = StepLog(run_dir / "metrics.jsonl", resume_step=3)
    for step in (4, 5, 6):
        record.log(step, {"loss": 1 / step})
    changed = PARAMS | {"optim.learning_rate": 1e-4, "parallel.tensor": 2}
    assert follow(run_dir, range(6, 8), "finished", params=changed, resume_step=5) == []
    after = Store(run_dir)
    assert after.run_id == before.run_id and after.run.info.status == "FINISHED"
    assert after.history("loss") == [(step, 1 / step) for step in range(1, 8)]
    assert after.run.data.params == before.run.data.params
    tags = {key: text for key, text in after.run.data.tags.items() if key.startswith("resumed.")}
    assert tags == {"resumed.optim.learning_rate": "0.0001", "resumed.parallel.tensor": "2"}


@pytest.mark.parametrize("kind", ["deleted", "unknown"])
def test_run_that_the_store_no_longer_has_is_made_anew(first_run, kind):
    run_dir = first_run.parent / kind
    run_dir.mkdir()
    lost = "0" * 32
    if kind == "deleted":
        follow(run_dir, range(1, 2), "failed")
        lost = Store(run_dir).run_id
        Store(run_dir).client.delete_run(lost)
    (run_dir / "mlflow_run_id").write_text(lost)
    assert follow(run_dir, range(1, 3), "finished") == []
    assert Store(run_dir).run_id != lost
    assert len(Store(run_dir).history("loss")) == 2


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_dead_server_neither_stops_nor_slows(tmp_path):
    said: list[str] = []
    port = closed_port()
    uri = f"http://127.0.0.1:{port}"
    options = {"uri": uri, "experiment": "e", "run_name": "r", "resume_step": 0}
    tracker = MlflowTracker(tmp_path, say=said.append, **options)
    tracker.start(PARAMS, [])
    num_steps = 12_000
    since = time.thread_time()
    for step in range(num_steps):
        tracker.log(step, {"loss": 1.0})
    assert (time.thread_time() - since) / num_steps < 1e-3
    tracker.finish("finished")
    assert len(said) == 2 and said[0].startswith(f"MLflow at {uri}: ")
    assert said[1].startswith(f"MLflow got 0 of {num_steps} steps; {tmp_path}/metrics.jsonl has")


def test_dead_server_is_named_without_its_password(tmp_path):
    address = f"127.0.0.1:{closed_port()}"
    complaint, _ = follow(
        tmp_path, range(1, 3), "failed", uri=f"http://user:secret@{address}", patience_seconds=1.0
    )
    assert complaint.startswith(f"MLflow at http://{address}: MlflowException: ")
    assert "Connection refused" in complaint and "secret" not in complaint


def test_silent_server_holds_neither_a_step_nor_the_end(tmp_path, monkeypatch):
    # Accepts connections and never answers, so that whoever waits for an answer waits for ever.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100000")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        said = follow(tmp_path, range(1, 4), "finished", uri=uri, patience_seconds=1.0)
    assert said[-1].startswith("MLflow got 0 of 3 steps")


QUIET = """
import sys, time
from pathlib import Path
import phi4.track
assert "mlflow" not in sys.modules, "importing the room imports mlflow"
tracker = phi4.track.MlflowTracker(Path(sys.argv[1]), uri=None, experiment="e", run_name="r",
                                   resume_step=0, say=print)
tracker.start({"a": 1}, [])
tracker.finish("finished")
from mlflow.telemetry import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled() and get_telemetry_client() is None
"""


def test_new_store_is_quiet_and_reports_to_nobody(tmp_path, monkeypatch):
    # mlflow turns its usage reports off by itself when it sees a test or a CI job.
    for name in ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    # Its user-wide identification file belongs to the test as well.
    monkeypatch.setenv("HOME", str(tmp_path))
    command = [sys.executable, "-c", QUIET, str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
