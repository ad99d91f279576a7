"""The process that follows: real ones, and its decisions with a parent that a test plays."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from phi4.errors import TrackingError
from phi4.track.mlflow import MlflowTracker, TrackingWish
from phi4.track.mlflow.messages import FollowRun, StatusSet, Told
from phi4.track.mlflow.process import LiveFollowing, Parent
from phi4.track.mlflow.store import MlflowStore
from tests.support.tracked_runs import TrackedDir
from tests.support.waiting import LONG_SECONDS, wait_until


@pytest.fixture
def run(tmp_path, monkeypatch) -> TrackedDir:
    # mlflow turns its usage reports off by itself when it sees a test or a CI job.
    for name in ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    # Its user-wide identification file belongs to the test as well.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return TrackedDir(tmp_path / "runs" / "one")


def test_run_is_followed_to_its_end_in_silence(run, capfd):
    run.begin()
    tracker = MlflowTracker(run.wish, run.said.append, patience_seconds=LONG_SECONDS)
    tracker.start({}, [])
    run.train(range(1, 6))
    wait_until(lambda: tracker._arrived == 5, "five steps")
    child = psutil.Process(tracker._process.pid)
    assert child.nice() == psutil.Process().nice() + 10
    # What asks a run to end is not for it.
    child.send_signal(signal.SIGTERM)
    run.log.rewind(3)
    run.train(range(4, 11), rolled_back_from=5, roll_backs=1)
    run.end("finished")
    tracker.finish("finished")
    assert run.steps() == list(range(1, 11))
    assert run.steps("after_rollback_1/loss") == [4, 5]
    assert run.run().info.status == "FINISHED"
    assert len(run.said) == 1 and run.said[0].startswith("MLflow: sqlite:///")
    assert capfd.readouterr() == ("", "")
    assert not Path(os.environ["HOME"]).exists()


DIES = """
import os, signal, sys, msgspec
from phi4.track.mlflow import MlflowTracker, TrackingWish
tracker = MlflowTracker(msgspec.json.decode(sys.argv[1], type=TrackingWish), print)
tracker.start({}, [])
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_run_whose_process_is_killed_is_complete_and_failed(run):
    run.begin()
    words = (sys.executable, "-c", DIES, msgspec.json.encode(run.wish).decode())
    with subprocess.Popen(words, stdin=subprocess.PIPE) as trainer:
        wait_until((run.run_dir / "mlflow.json").exists, "the MLflow run")
        run.train(range(1, 8))
        trainer.communicate()
    wait_until(lambda: run.run().info.status == "FAILED", "the status")
    assert run.steps() == list(range(1, 8))
    assert run.run().data.tags["attempt_1"].startswith("killed: ")


class PlayedParent:
    """A process that trains, as a test plays it."""

    def __init__(self, ended=None, *, is_gone=False) -> None:
        self.ended, self.is_gone = ended, is_gone
        self.told, self.waits = [], []
        self.at_wait: Callable[[], None] = lambda: None

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.at_wait()

    def tell(self, message) -> None:
        self.told.append(message)


def follow(run: TrackedDir, parent: PlayedParent, open_store=None) -> None:
    asked = FollowRun(run.wish, attempt=1, parent=1)
    LiveFollowing(
        parent, asked, open_store or (lambda wish: MlflowStore(wish, is_training=True))
    ).run()


def test_run_whose_process_is_gone_is_complete_and_failed(run):
    run.begin()
    run.train(range(1, 8))
    follow(run, PlayedParent(is_gone=True))
    assert run.steps() == list(range(1, 8)) and run.run().info.status == "FAILED"
    assert run.run().data.tags["attempt_1"].startswith("killed: ")


def test_attempt_that_was_taken_over_is_left_to_the_next(run):
    run.begin()
    run.end()
    run.begin()

    def open_store(wish: TrackingWish) -> MlflowStore:
        raise AssertionError("the store is another attempt's now")

    parent = PlayedParent(is_gone=True)
    follow(run, parent, open_store)
    assert parent.told == []


def test_follower_of_an_attempt_that_was_taken_over_sends_no_more(run):
    run.begin()
    run.train(range(1, 4))
    parent = PlayedParent()

    def at_wait() -> None:
        if len(parent.waits) == 2:
            run.end()
            run.begin(resume_step=2)
            run.train([3, 4])
            parent.ended = "failed"

    parent.at_wait = at_wait
    follow(run, parent)
    assert run.steps() == [1, 2, 3] and run.run().info.status == "RUNNING"
    assert parent.told[-1] == StatusSet()


def test_trouble_is_told_once_and_tried_again_later_and_later(run):
    run.begin()
    run.train(range(1, 4))
    troubles = [TrackingError("no such place"), OSError("Connection refused")] + [
        OSError("Connection refused") for _ in range(6)
    ]

    def open_store(wish: TrackingWish) -> MlflowStore:
        if troubles:
            raise troubles.pop(0)
        return MlflowStore(wish, is_training=True)

    parent = PlayedParent()

    def at_wait() -> None:
        if not troubles and len(parent.waits) > 9:
            parent.ended = "failed"

    parent.at_wait = at_wait
    follow(run, parent, open_store)
    assert parent.waits == [0, 1, 2, 4, 8, 16, 30, 30, 30, 1]
    first, second, opened, *_ = [m.text for m in parent.told if isinstance(m, Told)]
    assert first == "MLflow: no such place; training continues, and sending is retried"
    assert second.startswith("MLflow: Connection refused; expected a tracking server there")
    assert opened.startswith("MLflow: sqlite")
    assert parent.told[-1] == StatusSet()
    assert run.steps() == [1, 2, 3] and run.run().info.status == "FAILED"


def test_parent_is_gone_when_its_pipe_closes():
    there, here = os.pipe()
    back_there, back_here = os.pipe()
    parent = Parent(there, back_here)
    asked = FollowRun(TrackingWish(run_dir="/a"), attempt=3, parent=os.getppid())
    os.write(here, msgspec.json.encode(asked) + b'\n{"type":"Training')
    assert parent.asks() == asked
    os.write(here, b'Ended","status":"failed"}\n')
    parent.wait(LONG_SECONDS)
    assert (parent.ended, parent.is_gone) == ("failed", False)
    parent.ended = None
    os.close(here)
    parent.wait(LONG_SECONDS)
    assert parent.is_gone
    os.close(back_there)
    parent.tell(StatusSet())
    for descriptor in (there, back_here):
        os.close(descriptor)


def test_parent_is_gone_when_another_process_took_its_place():
    there, here = os.pipe()
    parent = Parent(there, 1)
    asked = FollowRun(TrackingWish(run_dir="/a"), attempt=3, parent=os.getppid() + 1)
    os.write(here, msgspec.json.encode(asked) + b"\n")
    parent.asks()
    parent.wait(LONG_SECONDS)
    assert parent.is_gone
    for descriptor in (there, here):
        os.close(descriptor)


UNASKED = """
from phi4.track.mlflow.address import connect
connect("http://127.0.0.1:1")
from mlflow.telemetry import get_telemetry_client
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled() and get_telemetry_client() is None
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as retries
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as seconds
assert (retries.get(), seconds.get()) == (0, 17), (retries.get(), seconds.get())
"""


def test_client_reports_to_nobody_and_obeys_the_users_limits(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "17")
    result = subprocess.run(
        [sys.executable, "-c", UNASKED], capture_output=True, text=True, timeout=LONG_SECONDS
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
