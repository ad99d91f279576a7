"""MLflow tells the truth about real runs, whatever happens to them and to its server.

    python -m tools.prove_tracking --json benchmarks/tracking.jsonl

A real `mlflow server` on loopback. A run is killed three times, resumes in another layout, is
rolled back, and the server dies under it; other runs train against a server that answers after
2, 9 and 11 seconds; one is told to stop; one is killed and settled. Then what MLflow's own client
reads is compared with metrics.jsonl, point for point. Last, what all that costs training.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from phi4.rundir.mlflow_ids import read_mlflow_ids
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics
from phi4.track.mlflow.points import metric_name
from phi4.verify.measured_rows import append_row
from tools.tracking_cost import LARGEST_RATIO, LARGEST_SHARE, measure
from tools.tracking_server import TrackingServer, slow_proxy, tracking_server

ROOT = Path(__file__).parents[1]
RECIPE = "examples/recipes/tiny_pretrain.toml"
STATUS_SECONDS = 30.0
"""From the next start on, MLflow says how the attempt before it ended."""

_LIMIT_SECONDS = 900.0
_ONE_PROCESS = ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=1")
_TWO_STAGES = ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=2")
_COMMON = ("data.held_out=[]", "checkpoint.every=10", "evaluation.every=0")
_NO_METRICS = {"step", "unix_seconds", "attempt"}


class TrackedRun:
    """A start of a run that MLflow shows.

    Args:
        run_dir: run directory of the run.
        uri: uri of the server.
        words: overrides.
        roll_back_at: step that it is rolled back from, once; 0 for none.
    """

    def __init__(
        self, run_dir: Path, uri: str, words: Sequence[str], roll_back_at: int = 0
    ) -> None:
        self.run_dir, self.started_at = run_dir, time.monotonic()
        self._log = run_dir.with_suffix(".log")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tools.tracking_run", str(roll_back_at)),
                    *("train", RECIPE, f"run.dir={run_dir}", *_COMMON, *words),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"},
            )

    def until(self, happened: Callable[[], Any], what: str) -> None:
        """Wait for something that happens while it trains."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain for {what}; the run said:\n{self.output()}")
            time.sleep(0.1)

    def end(self) -> int:
        """Exit code, once it ended."""
        return self.process.wait(timeout=_LIMIT_SECONDS)

    def kill(self) -> None:
        """SIGKILL to what the user started."""
        self.process.kill()
        self.process.wait()

    def kill_rank_0(self) -> None:
        """SIGKILL to the rank that writes, whose launcher then ends the run."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        next(p for p in ranks if p.environ().get("RANK") == "0").kill()
        self.process.wait()

    def output(self) -> str:
        """Return what all starts of the run said."""
        return self._log.read_text(errors="replace")


class Shown:
    """What MLflow's own client reads of a run."""

    def __init__(self, run_dir: Path, uri: str) -> None:
        self._run_dir, self._client = run_dir, MlflowClient(uri)

    def step(self) -> int:
        """Return the newest step of the record; 0 before the first."""
        path = self._run_dir / METRICS_FILE
        lines = read_metrics(path) if path.exists() else []
        return int(lines[-1]["step"]) if lines else 0

    def run(self) -> Any:
        """Return the MLflow run; None before there is one."""
        ids = read_mlflow_ids(self._run_dir)
        return ids and self._client.get_run(ids.run_id)

    def arrived(self) -> int:
        """Return the greatest step of the loss."""
        run = self.run()
        held = {m.key: m.step for m in run.data.to_proto().metrics} if run else {}
        return held.get("loss", 0)

    def tag(self, key: str) -> str:
        """Return a tag of the run; empty without it."""
        run = self.run()
        return run.data.tags.get(key, "") if run else ""

    def differences(self) -> list[str]:
        """Where the points are not those of the record; empty where they are."""
        run, lines = self.run(), read_metrics(self._run_dir / METRICS_FILE)
        history = {
            key: self._client.get_metric_history(run.info.run_id, key) for key in run.data.metrics
        }
        broken = [
            f"{key}: {len(found)} points of {len({m.step for m in found})} steps"
            for key, found in history.items()
            if len(found) != len({m.step for m in found})
        ]
        points = {(key, m.step): m for key, found in history.items() for m in found}
        replaced = {
            tag.removeprefix("rollback_"): text
            for tag, text in run.data.tags.items()
            if tag.startswith("rollback_")
        }
        for line in lines:
            for key in line.keys() - _NO_METRICS:
                broken += _broken(points, replaced, metric_name(key), line, line[key])
        for key, step in points:
            if key.startswith("after_rollback_"):
                first, last = map(int, replaced[key.split("/")[0].split("_")[2]].split()[1::2])
                is_new = key.endswith("/loss") and ("loss", step) not in points
                if is_new or not first <= step <= last:
                    broken.append(f"{key} has step {step}, which had not been sent")
        return broken

    def num_runs(self) -> int:
        """MLflow runs of this directory, without the parent that stands for its model."""
        experiments = [e.experiment_id for e in self._client.search_experiments()]
        query = f"attributes.run_name = '{self._run_dir.name}'"
        found = {run.info.run_id for run in self._client.search_runs(experiments, query)}
        return len(found - {self.tag("mlflow.parentRunId")})


def _broken(
    points: dict, replaced: dict[str, str], name: str, line: dict[str, float], value: float
) -> list[str]:
    """Return whether a step's value is where a reader finds it; it may be that of a first time."""
    step = int(line["step"])
    prefix = ""
    for label, text in replaced.items():
        if text.startswith("steps"):
            first, last = map(int, text.split()[1::2])
            prefix = f"after_rollback_{label}/" if first <= step <= last else prefix
    found = points.get((prefix + name, step))
    if found is None:
        return [f"{prefix}{name} lacks step {step}"]
    is_same = found.value == value or (math.isnan(found.value) and not math.isfinite(value))
    # Other than the loss, a step that is done again after a kill has other numbers: of time.
    if name == "loss" and not (is_same or math.isclose(found.value, value, rel_tol=1e-4)):
        return [f"{prefix}{name} of step {step} is {found.value}, the record has {value}"]
    return []


def phi4_track(*words: str) -> str:
    """Run `phi4 track`; gives what it said.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "phi4", "track", *words]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="", flush=True)
    return result.stdout


def torn(server: TrackingServer, directory: Path) -> dict[str, Any]:
    """Three kills, another layout, a rollback, and the server killed and back: one run."""
    run_dir = directory / "torn"
    shown, seconds = Shown(run_dir, server.uri), []

    def start(words: Sequence[str], roll_back_at: int = 0) -> TrackedRun:
        run = TrackedRun(run_dir, server.uri, (*words, "run.steps=120"), roll_back_at)
        number = len(list((run_dir / "attempts").glob("*.json")))
        if number:
            tag = f"attempt_{number}"
            run.until(lambda: shown.tag(tag).startswith("killed"), f"the tag {tag}")
            seconds.append(time.monotonic() - run.started_at)
        return run

    def further(run: TrackedRun, steps: int) -> None:
        step = shown.step() + steps
        run.until(lambda: shown.step() >= step and shown.arrived() >= step - 3, f"step {step}")

    run = start(_TWO_STAGES)
    further(run, 13)
    run.kill()
    run = start(_TWO_STAGES)
    further(run, 12)
    run.kill_rank_0()
    run = start(_ONE_PROCESS)
    further(run, 12)
    run.kill()
    # The newest checkpoint is of a multiple of ten.
    run = start(_ONE_PROCESS, roll_back_at=shown.step() // 10 * 10 + 18)
    run.until(lambda: shown.tag("rollback_1"), "the rollback")
    server.kill()
    further_step = shown.step() + 10
    run.until(lambda: shown.step() >= further_step, "ten steps without a server")
    server.start()
    code = run.end()
    before = shown.arrived()
    said = phi4_track("replay", str(run_dir))
    return {
        "differences": shown.differences(),
        "runs": shown.num_runs(),
        "exit_code": code,
        "arrived_before_replay": before,
        "replayed": said.strip().rpartition("has all")[2],
        "rollback": shown.tag("rollback_1"),
        "status": shown.run().info.status,
        "attempts": [shown.tag(f"attempt_{n}").split(":")[0] for n in (1, 2, 3, 4)],
        "status_seconds": [round(s, 1) for s in seconds],
    }


def slow(server: TrackingServer, directory: Path, delay: float) -> dict[str, Any]:
    """Test a slow server: nothing is sent twice, and nothing is lost."""
    run_dir = directory / f"slow_{delay:g}"
    with slow_proxy(server.uri, delay) as uri:
        code = TrackedRun(run_dir, uri, (*_ONE_PROCESS, "run.steps=60")).end()
        shown = Shown(run_dir, server.uri)
        before = shown.arrived()
        phi4_track("replay", str(run_dir), "--uri", uri)
    return {
        "differences": shown.differences(),
        "runs": shown.num_runs(),
        "exit_code": code,
        "arrived_before_replay": before,
        "status": shown.run().info.status,
    }


def ended(server: TrackingServer, directory: Path) -> dict[str, Any]:
    """Test a run that is told to stop, and one that is killed and settled."""
    told_dir, killed_dir = directory / "told", directory / "killed"
    run = TrackedRun(told_dir, server.uri, (*_ONE_PROCESS, "run.steps=500"))
    told = Shown(told_dir, server.uri)
    run.until(lambda: told.arrived() >= 5, "step 5")
    run.process.send_signal(signal.SIGTERM)
    code = run.end()
    run = TrackedRun(killed_dir, server.uri, (*_ONE_PROCESS, "run.steps=500"))
    killed = Shown(killed_dir, server.uri)
    run.until(lambda: killed.arrived() >= 5, "step 5")
    run.kill()
    phi4_track("settle", str(killed_dir))
    return {
        "differences": told.differences() + killed.differences(),
        "runs": max(told.num_runs(), killed.num_runs()),
        "exit_code": code,
        "told": [told.run().info.status, told.tag("attempt_1").split(":")[0]],
        "killed": [killed.run().info.status, killed.tag("attempt_1").split(":")[0]],
    }


def cost(server: TrackingServer, directory: Path, pairs: int) -> dict[str, Any]:
    """Measure the cost for training with a fast server, a slow one, and none."""
    with slow_proxy(server.uri, 9) as slow_uri:
        uris = {"answers": server.uri, "slow_9": slow_uri, "dead": "http://127.0.0.1:9"}
        return {name: measure(uri, directory / f"cost_{name}", pairs) for name, uri in uris.items()}


def faults(name: str, case: dict[str, Any]) -> list[str]:
    """Return what is not as it has to be; empty for a case that holds."""
    if name == "cost":
        return [
            f"with a server that is {server}: {row}"
            for server, row in case.items()
            if row["tracker_share"] > LARGEST_SHARE or row["ratio_95"][1] > LARGEST_RATIO
        ]
    expected: dict[str, Any] = {"runs": 1, "differences": []}
    if name == "ended":
        expected |= {"told": ["KILLED", "interrupted"], "killed": ["FAILED", "killed"]}
    else:
        expected |= {"exit_code": 0, "status": "FINISHED"}
    if name == "torn":
        expected["attempts"] = ["killed", "killed", "killed", "finished"]
    found = [f"{key} is {case[key]}" for key in expected if case[key] != expected[key]]
    if name == "torn" and not case["rollback"].startswith("steps"):
        found.append(f"the rollback replaced nothing: {case['rollback']}")
    if name == "torn" and max(case["status_seconds"]) > STATUS_SECONDS:
        found.append(f"status true after {case['status_seconds']} s")
    return found


def main() -> int:
    """Command line; exit 1 where MLflow does not tell what the record tells."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="append a row per case to this file")
    parser.add_argument("--pairs", type=int, default=96, help="of the cost; a few seconds each")
    parser.add_argument("--only", choices=("torn", "ended", "slow", "cost"))
    options = parser.parse_args()
    num_broken = 0
    with tempfile.TemporaryDirectory(prefix="phi4_tracking_") as scratch:
        directory = Path(scratch)
        with tracking_server(directory / "server") as server:
            cases: dict[str, Callable[[], dict[str, Any]]] = {
                "torn": lambda: torn(server, directory),
                "ended": lambda: ended(server, directory),
                "cost": lambda: cost(server, directory, options.pairs),
                **{f"slow_{d}": lambda d=d: slow(server, directory, d) for d in (2, 9, 11)},
            }
            for name, case in cases.items():
                if options.only is None or name.startswith(options.only):
                    found = case()
                    broken = faults(name, found)
                    num_broken += bool(broken)
                    print(json.dumps({name: found}), *broken, sep="\n", flush=True)
                    if options.json:
                        row = {"benchmark": "tracking", "case": name, "passed": not broken}
                        append_row(options.json, {**row, **found})
    print(f"tracking: {num_broken} cases broken")
    return int(num_broken > 0)


if __name__ == "__main__":
    sys.exit(main())
