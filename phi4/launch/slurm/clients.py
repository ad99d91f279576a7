"""Slurm's command line clients: every call has a time limit, every failure is one line.

Only the clients are used: they are on every cluster, slurmrestd and the libraries are not.
"""

import re
import subprocess
from dataclasses import dataclass

from phi4.errors import PlatformError

CLIENT_SECONDS = 60.0
"""A controller that fails over answers within its SlurmctldTimeout, half a minute on most sites."""

# What a job can end as. All others pass: SIGNALING, COMPLETING, REQUEUED, CONFIGURING, ...
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
    """A partition as sinfo shows it."""

    name: str
    num_nodes: int


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job."""

    state: str
    """RUNNING, PENDING, COMPLETED, FAILED, CANCELLED, ..."""
    restarts: int
    nodes: str
    reason: str
    exit_code: str
    """`code:signal`."""

    @property
    def is_active(self) -> bool:
        """Whether it runs or will run."""
        return self.state not in _ENDED


def call(*words: str) -> str:
    """Output of a client.

    Raises:
        PlatformError: it is not on this machine, failed, or did not answer.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise PlatformError(
            f"{words[0]} is not on PATH; run this on a login node of the cluster, or see the "
            "script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise PlatformError(
            f"{words[0]} did not answer in {CLIENT_SECONDS:.0f} s; see whether sinfo answers"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise PlatformError(f"{' '.join(words)}: {said}")
    return done.stdout


def version() -> tuple[int, int]:
    """Slurm's version, for example (22, 5).

    Raises:
        PlatformError: as `call`, or its answer names no version.
    """
    text = call("sbatch", "--version")
    found = re.search(r"(\d+)\.(\d+)", text)
    if not found:
        raise PlatformError(
            f"sbatch --version says {text.strip()!r}, which names no version; is it Slurm's?"
        )
    return int(found[1]), int(found[2])


def partitions() -> dict[str, SlurmPartition]:
    """All partitions by name.

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
    """The partition of a job that names none."""
    for line in call("sinfo", "-h", "-o", "%P").splitlines():
        if line.strip().endswith("*"):
            return line.strip()[:-1]
    return None


def job_state(job: str) -> JobState | None:
    """State of a job; None when the controller has forgotten it.

    Raises:
        PlatformError: as `call`, for another reason.
    """
    try:
        text = call("scontrol", "show", "job", "-o", job)
    except PlatformError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    fields = dict(re.findall(r"(\w+)=(\S+)", text))
    return JobState(
        fields.get("JobState", "UNKNOWN"),
        int(fields.get("Restarts", "0")),
        fields.get("NodeList", "(null)"),
        fields.get("Reason", "None"),
        fields.get("ExitCode", "0:0"),
    )
