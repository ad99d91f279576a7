"""Calls to Slurm's command line clients, each with a time limit and one-line errors.

Only the clients are used, because they exist on every cluster; slurmrestd and the libraries do not.
"""

import re
import subprocess
from dataclasses import dataclass

from phi4.errors import PlatformError

CLIENT_SECONDS = 60.0
"""A controller that fails over responds within its SlurmctldTimeout, half a minute on most
sites."""

_SOON_SECONDS = 5.0
"""For a query from a run that has little time left."""

# Final states of a job. All others are transient: SIGNALING, COMPLETING, REQUEUED, CONFIGURING, ...
_ENDED = frozenset(
    [
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "DEADLINE",
        "BOOT_FAIL",
        "PREEMPTED",
    ]
)


@dataclass(frozen=True)
class SlurmPartition:
    """A partition as reported by sinfo."""

    name: str
    num_nodes: int


@dataclass(frozen=True)
class JobState:
    """State of a job as reported by the controller."""

    state: str
    """RUNNING, PENDING, COMPLETED, FAILED, CANCELLED, ..."""
    restarts: int
    nodes: str
    reason: str
    exit_code: str
    """`code:signal`."""
    is_preempted: bool = False
    """Whether Slurm is preempting it, or was when it ended."""

    @property
    def is_active(self) -> bool:
        """Whether it runs or will run."""
        return self.state not in _ENDED


def call(*words: str, seconds: float = CLIENT_SECONDS) -> str:
    """Return the output of a client.

    Args:
        words: words of the command.
        seconds: time limit.

    Raises:
        PlatformError: the client is not installed, failed, or did not respond in time.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError:
        raise PlatformError(
            f"{words[0]} is not on PATH; run this on a login node of the cluster, or see the "
            "script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise PlatformError(
            f"{words[0]} did not respond within {seconds:.0f} s; check whether sinfo responds"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise PlatformError(f"{' '.join(words)}: {said}")
    return done.stdout


def version() -> tuple[int, int]:
    """Return Slurm's version, for example (22, 5).

    Raises:
        PlatformError: as `call`, or its output has no version.
    """
    text = call("sbatch", "--version")
    found = re.search(r"(\d+)\.(\d+)", text)
    if not found:
        raise PlatformError(
            f"sbatch --version printed {text.strip()!r}, which has no version; check that it is "
            f"Slurm's sbatch"
        )
    return int(found[1]), int(found[2])


def partitions() -> dict[str, SlurmPartition]:
    """Return all partitions by name.

    Raises:
        PlatformError: as `call`.
    """
    found: dict[str, SlurmPartition] = {}
    for line in call("sinfo", "-h", "-o", "%R|%D").splitlines():
        name, _, count = line.strip().partition("|")
        before = found[name].num_nodes if name in found else 0
        # One line per state of the nodes.
        found[name] = SlurmPartition(name, before + int(count))
    return found


def default_partition() -> str | None:
    """Return the partition of a job that specifies none."""
    for line in call("sinfo", "-h", "-o", "%P").splitlines():
        if line.strip().endswith("*"):
            return line.strip()[:-1]
    return None


def job_state(job: str, *, seconds: float = CLIENT_SECONDS) -> JobState | None:
    """Return the state of a job, or of a task of an array; None if the controller no longer knows
    it.

    Args:
        job: its id.
        seconds: time limit of the controller's response.

    Raises:
        PlatformError: as `call`, for another reason.
    """
    return next(iter(job_states(job, seconds=seconds)), None)


def job_states(job: str, *, seconds: float = CLIENT_SECONDS) -> list[JobState]:
    """Return states of the tasks of a job array; pending ones may share an entry.

    Raises:
        PlatformError: as `job_state`.
    """
    try:
        text = call("scontrol", "show", "job", "-o", job, seconds=seconds)
    except PlatformError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [_job_state(line) for line in text.splitlines() if line.strip()]


def _job_state(line: str) -> JobState:
    fields = dict(re.findall(r"(\w+)=(\S+)", line))
    return JobState(
        fields.get("JobState", "UNKNOWN"),
        int(fields.get("Restarts", "0")),
        fields.get("NodeList", "(null)"),
        fields.get("Reason", "None"),
        fields.get("ExitCode", "0:0"),
        fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"),
    )


def was_preempted(job: str) -> bool | None:
    """Return, for a job whose ranks were told to end, whether the cluster starts it again.

    Slurm reports a preemption. A job that keeps running had a notice of its time limit or of a
    coming preemption, and its script requeues it. Any other was cancelled.

    Args:
        job: its id; empty outside Slurm.

    Returns:
        None outside Slurm, and if the controller does not respond at once.
    """
    if not job:
        return None
    try:
        state = job_state(job, seconds=_SOON_SECONDS)
    except PlatformError:
        return None
    if state is None:
        return None
    return state.is_preempted or state.state == "RUNNING" or state.reason == "TimeLimit"
