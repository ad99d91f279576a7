"""`phi4 track replay` and `phi4 track settle`: after the run, and without it."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow import MlflowClient

from phi4 import cli
from phi4.config import with_overrides
from phi4.errors import DataError, OwnershipError, TrackingError
from phi4.track.mlflow import replay, send_file, settle
from phi4.track.mlflow.troubles import trouble_of
from tests.support.tracked_runs import TrackedDir


@pytest.fixture
def run(tmp_path) -> TrackedDir:
    return TrackedDir(tmp_path / "runs" / "one")


def killed(run: TrackedDir, num_steps: int = 6) -> None:
    """Four steps of it have been sent."""
    run.begin()
    run.train(range(1, 5))
    run.follow()
    run.train(range(5, num_steps + 1))
    run.end()


@pytest.mark.parametrize(("num_steps", "status"), [(6, "FAILED"), (10, "FINISHED")])
def test_settle_sends_the_rest_and_says_how_it_ended(run, num_steps, status):
    killed(run, num_steps)
    assert run.run().info.status == "RUNNING"
    settle(run.run_dir, run.said.append)
    found = run.run()
    assert (found.info.status, run.steps()) == (status, list(range(1, num_steps + 1)))
    assert found.data.tags["attempt_1"].startswith("killed: ")
    assert run.said[-1].endswith(
        f"has all {num_steps} steps ({num_steps - 4} points were missing); its status is {status}"
    )


def test_replay_fills_another_store_once(run, tmp_path):
    killed(run)
    before = (run.run_dir / "mlflow.json").read_text()
    other = tmp_path / "other.db"
    shutil.copy(run.run_dir.parent / "mlflow.db", other)
    other_client = MlflowClient(f"sqlite:///{other}")
    other_client.delete_run(run.run().info.run_id)
    for expected in ("(6 points were missing)", "(0 points were missing)"):
        replay(run.run_dir, run.said.append, uri=f"sqlite:///{other}", experiment="of old")
        assert expected in run.said[-1]
    experiment = other_client.get_experiment_by_name("of old")
    [found] = other_client.search_runs([experiment.experiment_id])
    history = other_client.get_metric_history(found.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
    # The run is still shown where it was.
    assert (run.run_dir / "mlflow.json").read_text() == before


def test_replay_after_a_roll_back_fills_an_empty_store_with_what_counts(run):
    run.begin()
    run.train(range(1, 4))
    run.train(range(4, 7), rolled_back_from=9, roll_backs=1)
    run.end("finished")
    for _ in range(2):
        replay(run.run_dir, run.said.append)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    tags = run.run().data.tags
    assert tags["rollback_1"] == "from step 4; none of them had been sent"
    assert not [key for key in run.run().data.metrics if key.startswith("after_")]


def test_run_that_is_going_on_is_refused_by_name_but_for_another_server(run, tmp_path):
    run.begin()
    run.train(range(1, 4))
    run.follow()
    for act in (settle, replay):
        with pytest.raises(OwnershipError, match=r"is owned by pid \d+ on "):
            act(run.run_dir, run.said.append)
    other = tmp_path / "other.db"
    shutil.copy(run.run_dir.parent / "mlflow.db", other)
    replay(run.run_dir, run.said.append, uri=f"sqlite:///{other}", experiment="b")
    client = MlflowClient(f"sqlite:///{other}")
    [found] = client.search_runs([client.get_experiment_by_name("b").experiment_id])
    assert found.info.status == "RUNNING"
    run.end()


def test_page_becomes_an_artifact_of_a_run_that_mlflow_shows(run, capsys):
    killed(run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run.run_dir), "--mlflow"])
    assert ended.value.code == 0, capsys.readouterr()
    found = run.client.list_artifacts(run.run().info.run_id)
    assert "report.html" in {artifact.path for artifact in found}
    (run.run_dir / "mlflow.json").unlink()
    with pytest.raises(DataError, match="phi4 track replay"):
        send_file(run.run_dir, run.run_dir / "report.html", run.said.append)


def test_settle_leaves_a_run_without_mlflow_alone(run):
    run.write_recipe(with_overrides(run.recipe, ["tracking.mlflow=false"]))
    run.begin()
    run.train([1])
    run.end()
    settle(run.run_dir, run.said.append)
    assert run.said == [
        f"{run.run_dir}: trained without MLflow; `phi4 track replay {run.run_dir}` sends it there"
    ]


@contextmanager
def server_that_answers(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            text = b"no"
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "text"),
    [(401, "set MLFLOW_TRACKING_USERNAME"), (403, "request write access"), (500, "its log")],
)
def test_server_that_refuses_is_told_with_a_remedy_and_no_password(run, status, text):
    killed(run)
    with server_that_answers(status) as address, pytest.raises(TrackingError) as raised:
        replay(run.run_dir, run.said.append, uri=f"http://user:secret@{address}")
    assert str(raised.value).startswith(f"http://{address}: ")
    assert text in str(raised.value) and "secret" not in str(raised.value)


def test_nobody_at_the_address_is_told(run, capsys):
    killed(run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["track", "replay", str(run.run_dir), "--uri", "http://user:secret@127.0.0.1:1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "TrackingError: http://127.0.0.1:1: Connection refused; expected a tracking server there: "
        "start it, or use another tracking.uri\n"
    )


def test_store_that_may_only_be_read_is_told(run, tmp_path):
    killed(run)
    uri = f"sqlite:///file:{run.run_dir.parent}/mlflow.db?mode=ro&uri=true"
    with pytest.raises(TrackingError, match="readonly database; the store must be writable"):
        replay(run.run_dir, run.said.append, uri=uri)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("(sqlite3.OperationalError) database or disk is full", "disk is full; the store's disk"),
        ("[Errno 28] No space left on device: '/a'", "free some"),
        ("(sqlite3.OperationalError) unable to open database file", "its directory must exist"),
        ("HTTPSConnectionPool(host='h'): Read timed out. (read timeout=60)", "responds too slowly"),
        (
            "('Connection aborted.', RemoteDisconnected('Remote end'))",
            "closed the connection during a request",
        ),
    ],
)
def test_other_troubles_have_remedies(text, remedy):
    told = trouble_of(OSError(f"a head\n{text}")).text
    assert remedy.replace("its directory", "the store's directory") in told


def test_unknown_trouble_is_told_in_one_line():
    told = trouble_of(ValueError("one // a:b@c //u:p@host two\nthree" + "x" * 900)).text
    assert told == "ValueError: one // a:b@c //host two"


def test_settle_of_all_runs_goes_on_behind_one_that_fails(run, monkeypatch, capsys):
    killed(run)
    monkeypatch.chdir(run.run_dir.parent.parent)
    other = TrackedDir(run.run_dir.parent / "two")
    other.begin()
    with pytest.raises(SystemExit) as ended:
        cli.main(["track", "settle"])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert "its status is FAILED" in shown.out and "runs/two" in shown.err
    with pytest.raises(SystemExit) as ended:
        cli.main(["track", "settle", "runs/two", "runs/one"])
    assert ended.value.code == 3
    other.end()


def test_ids_are_those_that_other_stages_read(run):
    killed(run)
    assert json.loads((run.run_dir / "mlflow.json").read_text()) == {
        "uri": f"sqlite:///{run.run_dir.parent}/mlflow.db",
        "experiment_id": "1",
        "run_id": run.run().info.run_id,
        "parent_run_id": "",
        "first_attempt": 1,
    }
