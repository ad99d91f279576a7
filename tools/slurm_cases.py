"""What becomes of a run on a real Slurm when its job is disturbed, case by case.

python -m tools.slurm_cases [--only preempt_notice ...] [--json benchmarks/slurm_cases.jsonl]

A private cluster of two nodes is brought up for each grace time, and `phi4 train` runs on it as
`phi4 launch slurm` submits it: two ranks, one per node. The verdict of a case is its final state,
that it never was COMPLETED before its last step, and what it lost: at most one step with a notice,
at most checkpoint.every without. Exit code 1 when a verdict is wrong.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from phi4.launch.slurm import attempts
from phi4.launch.slurm.clients import JobState, job_state
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint, step_of
from phi4.verify.measured_rows import append_row
from tools.slurm_cluster import SlurmCluster, slurm_cluster

ROOT = Path(__file__).parents[1]
EVERY = 10
"""checkpoint.every of the runs."""
_WAIT_SECONDS = 900
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class SlurmCase:
    """One disturbance and what is right after it.

    Attributes:
        disturb: does it, once the run has done a few steps; gets the run.
        state: the final state that is right.
        exit_code: Slurm's code:signal that is right; None where that is by chance, as after
            scancel, which kills the script when the ranks take longer than its KillWait.
        may_lose: steps that may be done twice.
        restarts: how often the job must have been requeued.
        grace_seconds: of the cluster's preemption.
        slurmd_timeout: seconds after which Slurm takes a silent node for lost.
        options: further words for `phi4 launch slurm`.
        environment: of the submission.
        at_step: when the disturbance comes; 0 before the submission.
        steps: run.steps.
        says: what the output must contain.
    """

    disturb: Callable[["CaseRun"], None]
    state: str
    exit_code: str | None = "0:0"
    may_lose: int = 0
    restarts: int = 1
    grace_seconds: int = 20
    slurmd_timeout: int = 10
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    at_step: int = 14
    steps: int = 60
    says: str = ""


class CaseRun:
    """A run that a case disturbs."""

    def __init__(self, cluster: SlurmCluster, root: Path, case: SlurmCase) -> None:
        self.cluster, self.root, self.case = cluster, root, case
        self.run_dir = root / "run"
        self.job = ""
        self.lost: list[int] = []
        """At each restart: steps that had been done and that the next attempt does again."""
        self.told_at: float | None = None
        """When the first attempt's script had decided, or Slurm for it."""
        self._peak = 0

    def submit(self) -> None:
        """By the command line, as a user would."""
        words = (
            f"launch slurm {self.root}/recipe.toml --nodes 2 --gpus-per-node 0 --tasks-per-node 1 "
            f"--partition low --signal-seconds 60 --time 30"
        ).split()
        done = subprocess.run(
            [sys.executable, "-m", "phi4", *words, *self.case.options],
            cwd=self.root,
            env={**os.environ, **self.case.environment},
            capture_output=True,
            text=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"not submitted: {done.stderr}")
        self.job = done.stdout.partition("job ")[2].split()[0]

    def state(self) -> JobState:
        """What Slurm says now; looks at the run's record, too."""
        self._observe()
        state = job_state(self.job)
        if state is None:
            raise RuntimeError(f"Slurm has forgotten job {self.job}")
        if state.restarts and self.told_at is None:
            self.told_at = time.monotonic()
        return state

    def _observe(self) -> None:
        # The next attempt cuts the undone steps from the record, some time after it started.
        all_of_them = attempts(self.run_dir)
        if self.told_at is None and any(attempt.end for attempt in all_of_them):
            self.told_at = time.monotonic()
        starts = [attempt.start.step for attempt in all_of_them]
        self._peak = max(self._peak, self.newest_recorded_step())
        while len(self.lost) < len(starts) - 1:
            begun_at = starts[len(self.lost) + 1]
            self.lost.append(max(0, self._peak - begun_at))
            self._peak = begun_at

    def has_asked_for_requeue(self) -> bool:
        """Whether the first attempt's script has decided; Slurm waits for lost nodes after that."""
        self._observe()
        return self.told_at is not None

    def newest_recorded_step(self) -> int:
        """The last line of metrics.jsonl; 0 without one."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(msgspec.json.decode(line)["step"])
            except msgspec.DecodeError:
                continue
        return 0

    def output(self) -> str:
        """Everything that script and ranks said."""
        logs = [*self.run_dir.glob("slurm/*.out"), *self.run_dir.glob("slurm/*/rank_*.log")]
        return "\n".join(path.read_text(errors="replace") for path in sorted(logs))

    def blocker(self) -> None:
        """A job of the high partition on both nodes, which preempts this one."""
        self.cluster.call(
            "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--parsable",
            "--output=/dev/null", "--wrap", "sleep 5",
        )  # fmt: skip


def wait_for(happened: Callable[[], bool], what: str) -> None:
    """Poll; a case that hangs ends."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_WAIT_SECONDS} s in vain for {what}")
        time.sleep(_POLL_SECONDS)


def lose(node: str) -> Callable[[CaseRun], None]:
    """The node's daemons and ranks die at once, and it comes back once Slurm has seen that."""

    def disturb(run: CaseRun) -> None:
        run.cluster.send(node, signal.SIGKILL)
        wait_for(lambda: run.state().restarts > 0, "the requeue after the loss of a node")
        run.cluster.restart(node)

    return disturb


def silence(run: CaseRun) -> None:
    """The second node stops without closing a connection; it comes back after the requeue."""
    run.cluster.send("n2", signal.SIGSTOP)
    wait_for(run.has_asked_for_requeue, "the requeue after a node went silent")
    run.cluster.send("n2", signal.SIGKILL)
    run.cluster.restart("n2")


def never_starts(run: CaseRun) -> None:
    """The second node takes no task: its daemon is stopped before the submission."""
    run.cluster.send("n2", signal.SIGSTOP)


def recover(run: CaseRun) -> None:
    """End of `never_starts`: the node answers again after the first requeue."""
    wait_for(run.has_asked_for_requeue, "the requeue after a node that did not start")
    run.cluster.send("n2", signal.SIGCONT)


CASES: dict[str, SlurmCase] = {
    "preempt_grace_0": SlurmCase(CaseRun.blocker, "COMPLETED", may_lose=EVERY, grace_seconds=0),
    "preempt_notice": SlurmCase(CaseRun.blocker, "COMPLETED", may_lose=1),
    "preempt_term": SlurmCase(
        CaseRun.blocker, "COMPLETED", may_lose=1, options=("--signal-seconds", "0")
    ),
    "lose_first_node": SlurmCase(lose("n1"), "COMPLETED", may_lose=EVERY),
    "lose_other_node": SlurmCase(lose("n2"), "COMPLETED", may_lose=EVERY),
    "scancel": SlurmCase(
        lambda run: run.cluster.call("scancel", run.job), "CANCELLED", None, 1, restarts=0
    ),
    "time_limit": SlurmCase(
        lambda run: None,
        "COMPLETED",
        may_lose=1,
        options=("--time", "2", "--signal-seconds", "25"),
        steps=200,
    ),
    "unresolvable_name": SlurmCase(
        lambda run: None,
        "FAILED",
        "2:0",
        restarts=0,
        at_step=0,
        environment={"MASTER_ADDR": "no-such-host.invalid"},
        says="no-such-host.invalid",
    ),
    "node_never_starts": SlurmCase(
        never_starts, "COMPLETED", at_step=0, says="n2", slurmd_timeout=300
    ),
    # Not Slurm but the watchdog of the other ranks is to notice it.
    "silent_node": SlurmCase(silence, "COMPLETED", may_lose=EVERY, slurmd_timeout=300),
}


def run_case(name: str, cluster: SlurmCluster, recipe: str) -> dict[str, object]:
    """Run a case to its end; gives its row."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="phi4case") as place:
        root = Path(place)
        (root / "recipe.toml").write_text(recipe)
        run = CaseRun(cluster, root, case)
        if case.at_step == 0:
            case.disturb(run)
        run.submit()
        begun = time.monotonic()
        if case.at_step:
            wait_for(lambda: run.newest_recorded_step() >= case.at_step, "the first steps")
            begun = time.monotonic()
            case.disturb(run)
        if case.disturb is never_starts:
            recover(run)
        return _row(name, run, begun)


def _row(name: str, run: CaseRun, begun: float) -> dict[str, object]:
    wait_for(lambda: not run.state().is_active, f"the end of job {run.job}")
    told_after = round(run.told_at - begun, 1) if run.told_at and run.lost else None
    state, case, all_of_them = run.state(), run.case, attempts(run.run_dir)
    last_step = all_of_them[-1].end.step if all_of_them[-1].end else 0
    lost = _steps_lost(run)
    wrong = [
        why
        for why, is_wrong in (
            (f"state {state.state}", state.state != case.state),
            (f"exit code {state.exit_code}", case.exit_code not in (None, state.exit_code)),
            (f"{state.restarts} restarts", state.restarts < case.restarts),
            (f"{lost} steps lost", lost > case.may_lose),
            ("completed early", state.state == "COMPLETED" and last_step < case.steps),
            (f"{case.says} is not named", case.says not in run.output()),
        )
        if is_wrong
    ]
    if wrong:
        print(run.output(), file=sys.stderr)
    return {
        "benchmark": "slurm_case",
        "case": name,
        "state": state.state,
        "exit_code": state.exit_code,
        "restarts": state.restarts,
        "steps_lost": lost,
        "seconds_to_requeue": told_after,
        "seconds_to_end": round(time.monotonic() - begun, 1),
        "passed": not wrong,
        "wrong": ", ".join(wrong),
    }


def _steps_lost(run: CaseRun) -> int:
    """The most of any restart; without one, what the newest checkpoint lacks."""
    if run.lost:
        return max(run.lost)
    checkpoint = latest_checkpoint(checkpoints_dir(run.run_dir))
    return run.newest_recorded_step() - (step_of(checkpoint) if checkpoint else 0)


def recipe_text(steps: int, data: Path) -> str:
    """A pipeline of two ranks, a layer each, on the demo's corpus."""
    from phi4.config import dump_toml, load_recipe

    tiny = ROOT / "examples" / "recipes" / "tiny_pretrain.toml"
    recipe = load_recipe(
        tiny,
        [
            "run.dir=run", f"run.steps={steps}", f"checkpoint.every={EVERY}", "parallel.tensor=1",
            "parallel.pipeline=2", "parallel.sequence=false", "tracking.mlflow=false",
            "model.num_layers=2", "evaluation.every=0", "reliability.silence_seconds=20",
            "reliability.stop_seconds=20",
        ],
    )  # fmt: skip
    return dump_toml(recipe).replace('"runs/demo/data', f'"{data}')


def run_cases(names: Sequence[str], data: Path, json_file: Path | None) -> list[dict[str, object]]:
    """The rows of the cases, printed as they come."""
    rows = []
    for name in names:
        # A cluster each: what one case leaves drained or down is no part of the next.
        with tempfile.TemporaryDirectory(prefix="slurm") as place:
            Path(place).chmod(0o711)
            case = CASES[name]
            with slurm_cluster(
                Path(place) / "c",
                grace_seconds=case.grace_seconds,
                slurmd_timeout=case.slurmd_timeout,
            ) as cluster:
                row = run_case(name, cluster, recipe_text(case.steps, data))
        rows.append(row)
        if json_file:
            append_row(json_file, row)
        print(msgspec.json.encode(row).decode(), flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "demo" / "data")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.data.exists():
        subprocess.run([sys.executable, "-m", "phi4", "data", "demo"], cwd=ROOT, check=True)
    rows = run_cases(arguments.only, arguments.data.resolve(), arguments.json)
    right = sum(bool(row["passed"]) for row in rows)
    print(f"{right} of {len(rows)} cases are right")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
