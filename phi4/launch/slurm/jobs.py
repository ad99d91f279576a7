"""The Slurm jobs of a run: status, history, output, and cancellation."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.errors import ConfigError
from phi4.launch.slurm import clients
from phi4.launch.slurm.submission import ATTEMPTS_FILE, Submission, read_lines, submissions
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint, step_of
from phi4.rundir.names import SLURM_DIR, STOP_FILE


class AttemptLine(msgspec.Struct, frozen=True):
    """One line of attempts.jsonl: the start or the end of an attempt."""

    job: str
    attempt: int
    time: str
    event: str
    code: int
    then: str
    """train; at its end requeue, cancel or end."""
    why: str
    step: int
    """Step of the newest checkpoint."""
    nodes: str


@dataclass(frozen=True)
class JobAttempt:
    """One attempt; the end is None while it runs, and if the script could not record it (the first
    node was lost, or Slurm killed the job without notice)."""

    start: AttemptLine
    end: AttemptLine | None


@dataclass(frozen=True)
class RunStatus:
    """Known state of a run's newest job."""

    run_dir: Path
    submission: Submission
    job: clients.JobState | None
    """None if Slurm no longer knows the job."""
    step: int
    """Step of the newest checkpoint."""
    attempts: int


def status(run_dir: Path) -> RunStatus:
    """Return the status of a run's newest job.

    Raises:
        ConfigError: no job was submitted for it.
        PlatformError: Slurm does not respond.
    """
    submission = newest(run_dir)
    checkpoint = latest_checkpoint(checkpoints_dir(run_dir))
    return RunStatus(
        run_dir,
        submission,
        clients.job_state(submission.job),
        0 if checkpoint is None else step_of(checkpoint),
        len([a for a in attempts(run_dir) if a.start.job == submission.job]),
    )


def newest(run_dir: Path) -> Submission:
    """Return the newest submission.

    Raises:
        ConfigError: there is none.
    """
    all_of_them = submissions(run_dir)
    if not all_of_them:
        raise ConfigError(
            f"{run_dir} has no {SLURM_DIR}/submissions.jsonl; give the run.dir of a run that "
            "`phi4 launch slurm` submitted"
        )
    return all_of_them[-1]


def attempts(run_dir: Path) -> list[JobAttempt]:
    """Return every attempt of every job of the run, oldest first."""
    lines: list[AttemptLine] = read_lines(run_dir / SLURM_DIR / ATTEMPTS_FILE, AttemptLine)
    ends = {(line.job, line.attempt): line for line in lines if line.event == "end"}
    starts = [line for line in lines if line.event == "start"]
    return [JobAttempt(start, ends.get((start.job, start.attempt))) for start in starts]


def cancel(run_dir: Path, *, save: bool) -> str:
    """Cancel the newest job.

    Args:
        run_dir: run directory of the run.
        save: let a running job save first.

    Returns:
        A line that says what was done.

    Raises:
        ConfigError: there is no job to cancel.
        PlatformError: Slurm does not respond.
    """
    submission = newest(run_dir)
    state = clients.job_state(submission.job)
    if state is None or not state.is_active:
        said = "is no longer known to Slurm" if state is None else f"is {state.state}"
        raise ConfigError(f"job {submission.job} of {run_dir} {said}; there is nothing to cancel")
    if save and state.state == "RUNNING":
        (run_dir / STOP_FILE).touch()
        return f"job {submission.job} saves its step and then ends as CANCELLED"
    clients.call("scancel", submission.job)
    return f"job {submission.job} is cancelled"


def log_paths(run_dir: Path, rank: int) -> list[Path]:
    """Return existing paths of the newest job's output: its script's, then a rank's in its newest
    attempt."""
    directory, job = run_dir / SLURM_DIR, newest(run_dir).job
    numbers = [a.start.attempt for a in attempts(run_dir) if a.start.job == job]
    paths = [directory / f"{job}.out"]
    if numbers:
        paths.append(directory / f"{job}.{numbers[-1]}" / f"rank_{rank}.log")
    return [path for path in paths if path.exists()]
