"""One run on the private Slurm, as `phi4 launch slurm` submits it, and what can be seen of it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from phi4.launch.slurm import attempts
from phi4.launch.slurm.clients import JobState, job_state
from phi4.rundir.names import METRICS_FILE
from tools.slurm_cluster import SlurmCluster

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
        must_lose: steps that must be, where the case is about a run that cannot save.
        restarts: how often the job must have been requeued.
        grace_seconds: grace time of the cluster's preemption.
        kill_wait_seconds: KillWait of the cluster; slurmd uses at least 5.
        slurmd_timeout: seconds after which Slurm takes a silent node for lost.
        nodes: the value of `--nodes`.
        options: further words for `phi4 launch slurm`.
        overrides: overrides of the recipe.
        environment: environment of the submission.
        at_step: when the disturbance comes; 0 before the submission.
        steps: run.steps.
        every: checkpoint.every.
        says: what the output must contain.
        undisturbed: overrides that start the run in the layout of its first attempt without Slurm,
            to be compared with; None compares nothing.
        shown: what MLflow must show at the end; empty where anything is right.
        ends_on: nodes that the last attempt must have had; empty where any are right.
    """

    disturb: Callable[["CaseRun"], None]
    state: str
    exit_code: str | None = "0:0"
    may_lose: int = 0
    must_lose: int = 0
    restarts: int = 1
    grace_seconds: int = 20
    kill_wait_seconds: int = 10
    slurmd_timeout: int = 10
    nodes: str = "2"
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    at_step: int = 14
    steps: int = 60
    every: int = 10
    says: str = ""
    undisturbed: tuple[str, ...] | None = None
    ends_on: str = ""
    shown: str = ""


class CaseRun:
    """A run that a case disturbs."""

    def __init__(self, cluster: SlurmCluster, root: Path, case: SlurmCase) -> None:
        self.cluster, self.root, self.case = cluster, root, case
        self.run_dir = root / "run"
        self.job = ""
        self.said = ""
        """What the newest submission printed."""
        self.lost: list[int] = []
        """At each restart: steps that had been done and that the next attempt does again."""
        self.told_at: float | None = None
        """When the first attempt's script had decided, or Slurm for it."""
        self._peak = 0

    def submit(self, *overrides: str) -> None:
        """By the command line, as a user would; with overrides of the recipe."""
        words = (
            f"launch slurm {self.root}/recipe.toml --nodes {self.case.nodes} --gpus-per-node 0 "
            "--tasks-per-node 1 --partition low --signal-seconds 60 --time 30"
        ).split()
        self.said = self.phi4(*words, *self.case.options, *overrides)
        self.job = self.said.partition("job ")[2].split()[0]

    def phi4(self, *words: str) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "phi4", *words],
            cwd=self.root,
            env={**os.environ, **self.case.environment},
            capture_output=True,
            text=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"phi4 {' '.join(words)} says {done.returncode}: {done.stderr}")
        return done.stdout

    def state(self) -> JobState:
        """Return what Slurm says now; looks at the run's record, too."""
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
        """Return the last line of metrics.jsonl; 0 without one."""
        path = self.run_dir / METRICS_FILE
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(msgspec.json.decode(line)["step"])
            except msgspec.DecodeError:
                continue
        return 0

    def output(self) -> str:
        """Everything that the submission, script and ranks said."""
        logs = [*self.run_dir.glob("slurm/*.out"), *self.run_dir.glob("slurm/*/rank_*.log")]
        return "\n".join([self.said, *(path.read_text(errors="replace") for path in sorted(logs))])

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
