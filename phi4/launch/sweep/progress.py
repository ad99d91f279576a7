"""Progress of a sweep's runs, read from their directories.

A run is finished when its newest checkpoint is of its last step, however it was started; runs.jsonl
and Slurm's attempts only add how the others ended.

SWEEP/
  runs.jsonl    start and end of every child process, written by `phi4 sweep run`
  recipes/      the recipe of every run, as it was started
  logs/         what the runs printed
  runs/NAME/    their run directories
  slurm/        script and submissions of the job arrays
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from phi4.config import changed_keys, recipe_from_toml
from phi4.errors import ConfigError, DivergedError
from phi4.launch.slurm.jobs import attempts
from phi4.launch.slurm.submission import read_lines
from phi4.launch.sweep.runs import SweepRun
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint, step_of
from phi4.rundir.names import CONFIG_FILE

RUNS_FILE = "runs.jsonl"

Status = Literal["waiting", "started", "finished", "diverged", "failed"]


class RunEvent(msgspec.Struct, frozen=True):
    """One line of runs.jsonl."""

    run: str
    event: Literal["start", "end"]
    unix_seconds: float
    pid: int
    exit_code: int | None = None


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run.

    Attributes:
        step: step of its newest checkpoint.
        exit_code: of its last process; None while it runs, and where nothing could note it.
    """

    status: Status
    step: int
    exit_code: int | None

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do: a run that diverged would diverge again."""
        return self.status in ("finished", "diverged")


def progress_of(runs: Sequence[SweepRun], directory: Path) -> dict[str, RunProgress]:
    """Return the progress of every run, by name.

    Raises:
        ConfigError: a run was started with a recipe that differs from the sweep file.
    """
    last: dict[str, RunEvent] = {}
    for event in read_lines(directory / RUNS_FILE, RunEvent):
        last[event.run] = event
    return {run.name: _progress(run, last.get(run.name)) for run in runs}


def note(directory: Path, run: str, pid: int, exit_code: int | None = None) -> None:
    """Append the start of a run's process, or its end with its exit code."""
    event: Literal["start", "end"] = "start" if exit_code is None else "end"
    line = RunEvent(run, event, time.time(), pid, exit_code)
    with (directory / RUNS_FILE).open("ab", buffering=0) as file:
        file.write(msgspec.json.encode(line) + b"\n")


def _progress(run: SweepRun, last: RunEvent | None) -> RunProgress:
    if not run.run_dir.exists():
        # Removed by a user to repeat it, or never started.
        code = None if last is None or last.exit_code == DivergedError.exit_code else last.exit_code
        return RunProgress("waiting" if code is None else "failed", 0, code)
    _require_same(run)
    newest = latest_checkpoint(checkpoints_dir(run.run_dir))
    step = 0 if newest is None else step_of(newest)
    if step >= run.recipe.run.steps:
        return RunProgress("finished", step, 0)
    code = _last_code(run, last)
    if code == DivergedError.exit_code:
        return RunProgress("diverged", step, code)
    if code is not None:
        return RunProgress("failed", step, code)
    # A pending job array has only written its recipe.
    has_begun = last is not None or (run.run_dir / CONFIG_FILE).exists() or attempts(run.run_dir)
    return RunProgress("started" if has_begun else "waiting", step, None)


def _last_code(run: SweepRun, last: RunEvent | None) -> int | None:
    """Return the exit code of the run's last process, here or on Slurm."""
    jobs = attempts(run.run_dir)
    if jobs:
        return None if jobs[-1].end is None else jobs[-1].end.code
    return None if last is None else last.exit_code


def _require_same(run: SweepRun) -> None:
    path = run.run_dir / CONFIG_FILE
    if not path.exists():
        return
    before = recipe_from_toml(path.read_text(encoding="utf-8"), where=str(path))
    changes = changed_keys(before, run.recipe)
    keys = sorted({*changes["identity"], *changes["schedule"]})
    if keys:
        old, new = {**changes["identity"], **changes["schedule"]}[keys[0]]
        raise ConfigError(
            f"{run.run_dir} was trained with another {', '.join(keys)} ({keys[0]}: {old!r}, now "
            f"{new!r}); restore the sweep file, give it another directory, or remove that run"
        )
