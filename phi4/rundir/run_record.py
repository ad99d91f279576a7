"""Read everything that a run's directory records as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4.config import Recipe, recipe_from_toml
from phi4.errors import DataError
from phi4.rundir.attempts import Attempt, attempt_path, newest_attempt, read_attempt
from phi4.rundir.names import CONFIG_FILE, METRICS_FILE, UNDONE_FILE
from phi4.rundir.save_log import SaveEvent, read_saves
from phi4.rundir.step_log import read_metrics, read_undone


@dataclass(frozen=True)
class RunRecord:
    """The recorded data of a run.

    Attributes:
        run_dir: run directory of the run.
        recipe: recipe of its newest attempt.
        steps: the accepted lines of metrics.jsonl, steps increasing; docs/metrics.md lists the
            keys.
        undone: lines that a rollback or a resume cut off, with `undone_by`.
        attempts: by number, from 1.
        saves: events of checkpoints.jsonl.
    """

    run_dir: Path
    recipe: Recipe
    steps: Sequence[Mapping[str, Any]]
    undone: Sequence[Mapping[str, Any]]
    attempts: Mapping[int, Attempt]
    saves: Sequence[SaveEvent]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run's directory; missing files count as empty, except the recipe and metrics.jsonl.

    Raises:
        DataError: there is no run in the directory, or a line of its metrics.jsonl is damaged.
        ConfigError: its config.toml is not a recipe.
    """
    config = run_dir / CONFIG_FILE
    try:
        text = config.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{config} does not exist; give the directory of a run") from None
    steps = read_metrics(run_dir / METRICS_FILE)
    accepted = {_identity(line) for line in steps}
    undone = read_undone(run_dir / UNDONE_FILE)
    numbers = range(1, newest_attempt(run_dir) + 1)
    found = {number: read_attempt(attempt_path(run_dir, number)) for number in numbers}
    return RunRecord(
        run_dir=run_dir,
        recipe=recipe_from_toml(text, where=str(config)),
        steps=steps,
        undone=[line for line in undone if _identity(line) not in accepted],
        attempts={number: attempt for number, attempt in found.items() if attempt is not None},
        saves=_saves(run_dir),
    )


def _identity(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in ("attempt", "step", "unix_seconds"))


def _saves(run_dir: Path) -> list[SaveEvent]:
    try:
        return read_saves(run_dir)
    except DataError:
        return []
