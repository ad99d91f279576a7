"""Submit a run to Slurm, and record the submission in `RUN/slurm/`.

A job trains a copy of the recipe made at submission, so that an edit of the original cannot change
a run between two attempts. The next submission reports the differences.

RUN/slurm/
  recipe.toml         the newest submission's recipe, overrides applied
  job.sh              its script
  submissions.jsonl   one line per submission
  attempts.jsonl      start and end of every attempt, written by the script
  12.out              what the script of job 12 said
  12.0/               of its first attempt: rank_N.log, exit/N with the code of a rank that failed
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from phi4.config import Recipe, changed_keys, dump_toml, recipe_from_toml
from phi4.errors import ConfigError, OwnershipError, PlatformError
from phi4.launch.slurm import clients
from phi4.launch.slurm.request import SlurmRequest
from phi4.launch.slurm.script import script_text
from phi4.rundir.attempts import utc_text
from phi4.rundir.names import RECIPE_FILE, SLURM_DIR, STOP_FILE

OLDEST_VERSION = (22, 5)
SCRIPT_FILE = "job.sh"
SUBMISSIONS_FILE = "submissions.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"


class Submission(msgspec.Struct, frozen=True):
    """One line of submissions.jsonl."""

    job: str
    time: str
    """Submission time in UTC, for people."""
    command: str
    nodes: str
    steps: int


def submitted_recipe_path(run_dir: str) -> Path:
    """Return the path of the recipe copy that a job trains."""
    return Path(run_dir) / SLURM_DIR / RECIPE_FILE


def submissions(run_dir: Path) -> list[Submission]:
    """Return all submissions of a run, newest last."""
    return read_lines(run_dir / SLURM_DIR / SUBMISSIONS_FILE, Submission)


def read_lines(path: Path, kind: type) -> list:
    """Read the lines of a .jsonl file; none if it does not exist. An incomplete last line is
    skipped."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    found: list = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError as error:
            if number < len(lines):
                raise ConfigError(
                    f"{path}:{number} is damaged ({error}); repair or remove it"
                ) from None
    return found


def require_same_run(
    run_dir: str, recipe: Recipe, *, allow: bool, say: Callable[[str], None]
) -> None:
    """Report differences from the previously submitted recipe.

    Raises:
        ConfigError: an identity key differs, or a schedule key does and `allow` is False.
    """
    path = submitted_recipe_path(run_dir)
    if not path.exists():
        return
    before = recipe_from_toml(path.read_text(encoding="utf-8"), where=str(path))
    changes = changed_keys(before, recipe)
    for kind, keys in changes.items():
        for key, (old, new) in sorted(keys.items()):
            say(f"{kind:8}  {key}: {old!r} -> {new!r}")
    if changes["identity"]:
        raise ConfigError(
            f"{', '.join(sorted(changes['identity']))} differs from the previous submission and "
            f"cannot change in a run; restore the value, or use another run.dir than {run_dir}"
        )
    if changes["schedule"] and not allow:
        raise ConfigError(
            f"{', '.join(sorted(changes['schedule']))} differs from the previous submission; pass "
            f"--change to continue with the new value"
        )


def require_idle(run_dir: str) -> None:
    """Raise an error if the run already has an active job.

    Raises:
        OwnershipError: the newest job is running or pending.
        ConfigError: the stop file exists.
        PlatformError: Slurm does not respond.
    """
    stop = Path(run_dir) / STOP_FILE
    if stop.exists():
        raise ConfigError(f"{stop} exists, so the job would stop at once; remove it")
    for submission in submissions(Path(run_dir))[-1:]:
        state = clients.job_state(submission.job)
        if state is not None and state.is_active:
            raise OwnershipError(
                f"job {submission.job} of {run_dir} is {state.state}; wait for it, or run `phi4 "
                f"launch cancel {run_dir}` first"
            )


def require_version() -> None:
    """Raise an error for a Slurm version that the script does not support.

    Raises:
        PlatformError: it is too old, or does not respond.
    """
    major, minor = clients.version()
    if (major, minor) < OLDEST_VERSION:
        raise PlatformError(
            f"Slurm {major}.{minor:02d} is older than 22.05, the first version whose srun supports "
            f"--cpus-per-task and --ntasks-per-node of a step as the script uses them; see "
            f"--dry-run"
        )


def require_partition(request: SlurmRequest) -> None:
    """Raise an error for a partition or a number of nodes that the cluster does not have.

    Raises:
        ConfigError: the partition is unknown, or has fewer nodes than asked.
        PlatformError: Slurm does not respond.
    """
    known = clients.partitions()
    name = request.partition or clients.default_partition()
    if name is None:
        raise ConfigError(
            f"the cluster has no default partition; use --partition {' or '.join(known)}"
        )
    if name not in known:
        raise ConfigError(f"partition {name!r} does not exist; use {' or '.join(sorted(known))}")
    if request.nodes.least > known[name].num_nodes:
        raise ConfigError(
            f"--nodes={request.nodes} is more than the {known[name].num_nodes} nodes of partition "
            f"{name}; ask for fewer"
        )


def submit(request: SlurmRequest, recipe: Recipe) -> str:
    """Write recipe and script, submit them with sbatch, and record the job.

    Returns:
        The job's id.

    Raises:
        PlatformError: sbatch refuses; the message has its reason.
    """
    script = _tested_script(request)
    directory = script.parent
    _replace(directory / RECIPE_FILE, dump_toml(recipe))
    job = clients.call("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    _note(directory, job, request, request.last_step)
    return job


def _tested_script(request: SlurmRequest) -> Path:
    """Write the script and check it with sbatch; return its path.

    Raises:
        PlatformError: the directory cannot be written, or sbatch refuses; the message has its
            reason.
    """
    directory = Path(request.run_dir) / SLURM_DIR
    script = directory / SCRIPT_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(script, script_text(request))
    except OSError as error:
        raise PlatformError(f"run.dir={request.run_dir} cannot be written: {error}") from None
    # Everything that sbatch would refuse is checked before the copy of a recipe is replaced.
    clients.call("sbatch", "--test-only", str(script))
    return script


def submit_array(request: SlurmRequest, recipes: Sequence[Recipe]) -> str:
    """Write the recipe of every task and the script, submit them with sbatch, and record the array.

    It is recorded for the array and for every run, so that `phi4 launch status` and related
    commands work on the run's directory.

    Args:
        request: with one task per recipe.
        recipes: recipes of the tasks, in order.

    Returns:
        The array's id.

    Raises:
        PlatformError: sbatch refuses; the message has its reason.
    """
    assert len(recipes) == len(request.tasks)
    script = _tested_script(request)
    directory = script.parent
    for task, recipe in zip(request.tasks, recipes, strict=True):
        (Path(task.run_dir) / SLURM_DIR).mkdir(parents=True, exist_ok=True)
        _replace(submitted_recipe_path(task.run_dir), dump_toml(recipe))
    array = clients.call("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    _note(directory, array, request, request.last_step)
    for index, task in enumerate(request.tasks):
        _note(Path(task.run_dir) / SLURM_DIR, f"{array}_{index}", request, task.last_step)
    return array


def require_idle_array(directory: str) -> None:
    """Raise an error if the sweep already has an active job array.

    Raises:
        OwnershipError: tasks of the newest one are running or pending.
        PlatformError: Slurm does not respond.
    """
    for submission in submissions(Path(directory))[-1:]:
        active = [s.state for s in clients.job_states(submission.job) if s.is_active]
        if active:
            raise OwnershipError(
                f"job array {submission.job} of {directory} has tasks that are "
                f"{' and '.join(sorted(set(active)))}; wait for it, or `scancel {submission.job}`"
            )


def _note(directory: Path, job: str, request: SlurmRequest, steps: int) -> None:
    line = Submission(job, utc_text(time.time()), request.written_by, str(request.nodes), steps)
    with (directory / SUBMISSIONS_FILE).open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
