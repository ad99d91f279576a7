"""What training has to do with MLflow: start a process, and end with it or without it."""

import signal
import subprocess
import sys
import time

import msgspec

from phi4.track.mlflow import MlflowTracker, TrackingWish
from tests.support.waiting import LONG_SECONDS, wait_until

TELLS = """
import json, os, signal, sys
asked = json.loads(sys.stdin.readline())
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
facts = [asked["wish"]["run_dir"], asked["parent"], os.getsid(0) == os.getpid(), blocked]
print(json.dumps({"type": "Told", "text": json.dumps(facts)}), flush=True)
print(json.dumps({"type": "Arrived", "step": 2}), flush=True)
sys.stderr.write("not for a terminal")
ended = json.loads(sys.stdin.readline())
print(json.dumps({"type": "Told", "text": ended["status"]}), flush=True)
print(json.dumps({"type": "StatusSet"}), flush=True)
"""
SILENT = "import time; time.sleep(1000000)"
DIES = "import sys; sys.exit(9)"


def tracker_of(script: str, said: list[str], patience_seconds=LONG_SECONDS) -> MlflowTracker:
    return MlflowTracker(
        TrackingWish(run_dir="/a/run"),
        said.append,
        patience_seconds=patience_seconds,
        command=(sys.executable, "-c", script),
    )


def test_process_is_told_and_tells(capfd):
    said: list[str] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    tracker = tracker_of(TELLS, said)
    tracker.start({}, [])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish("interrupted")
    facts, status = said
    run_dir, parent, has_session, blocked = msgspec.json.decode(facts)
    assert (run_dir, status, has_session) == ("/a/run", "interrupted", True)
    assert parent > 0
    # What asks a run to end, or is sent to every process of a Slurm step.
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP} <= set(blocked)
    assert capfd.readouterr() == ("", "")


def test_process_that_does_not_answer_holds_neither_a_step_nor_the_end():
    said: list[str] = []
    tracker = tracker_of(SILENT, said, patience_seconds=0.5)
    tracker.start({}, [])
    child = tracker._process
    since, num_steps = time.thread_time(), 12_000
    for step in range(1, num_steps + 1):
        tracker.log(step, {"loss": 1.0})
    assert (time.thread_time() - since) / num_steps < 1e-4
    tracker.finish("finished")
    assert said == [
        "MLflow has 0 of 12000 steps; metrics.jsonl has all of them, and "
        "`phi4 track replay /a/run` sends the rest"
    ]
    assert child.poll() == -signal.SIGKILL


def test_process_that_dies_is_told_once_and_ends_nothing():
    said: list[str] = []
    tracker = tracker_of(DIES, said)
    tracker.start({}, [])
    wait_until(lambda: said, "the line about the end")
    tracker.log(3, {"loss": 1.0})
    tracker.finish("finished")
    assert said[0] == (
        "the process that fills MLflow ended with code 9 at step 0; training continues, `phi4 "
        "track replay /a/run` sends the rest"
    )
    assert len(said) == 2 and said[1].startswith("MLflow has 0 of 3 steps; ")


def test_steps_that_were_undone_are_not_missed():
    said: list[str] = []
    tracker = tracker_of(SILENT, said, patience_seconds=0.1)
    tracker.start({}, [])
    tracker.log(9, {"loss": 1.0})
    tracker.rewind(0)
    tracker.finish("failed")
    assert said == [
        "MLflow has all steps but not the run's final status; `phi4 track settle /a/run` sets it"
    ]


def test_package_is_imported_without_mlflow():
    script = "import sys, phi4.track; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=LONG_SECONDS)
