"""A run for the report: its record, and the other files of its directory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from phi4.errors import DataError, Phi4Error
from phi4.rundir.attempts import attempt_path, trace_of
from phi4.rundir.checkpoints import checkpoints_dir, complete_checkpoints, latest_checkpoint
from phi4.rundir.goodput import Goodput, goodput_of
from phi4.rundir.names import ABOUT_DIR, CONFIG_FILE, KERNELS_FILE, LEDGER_FILE, SYSTEM_DIR
from phi4.rundir.roll_back import read_roll_back
from phi4.rundir.run_record import RunRecord, read_run
from phi4.rundir.state import RunState, read_state
from phi4.track.report.colours import run_colour
from phi4.track.report.curves import Lines

MOST_NODES = 8
"""Maximum number of machines whose samples are shown."""


@dataclass(frozen=True)
class ReportedRun:
    """One run of the page.

    Attributes:
        index: index among the runs of the page.
        label: unique name on the page.
        colour: colour of its curves.
        record: its record.
        goodput: its goodput.
        problems: one line per file that could not be read.
        state: state of its newest checkpoint, or of a newer rollback; None without either.
    """

    index: int
    label: str
    colour: str
    record: RunRecord
    goodput: Goodput
    state: RunState | None
    problems: tuple[str, ...]

    @property
    def began_unix(self) -> float:
        """First start, or the first line's time; 0 if not recorded."""
        first = next(iter(self.record.steps), {})
        return self.goodput.began_unix or first.get("unix_seconds", 0.0)

    @property
    def undone(self) -> Sequence[Mapping[str, Any]]:
        """Lines that were cut off."""
        return self.record.undone

    @cached_property
    def lines(self) -> Lines:
        """The accepted history."""
        return Lines(self.record.steps, self.began_unix)

    @cached_property
    def about(self) -> Mapping[int, Mapping[str, Any]]:
        """Metadata of each attempt, by number; missing if not recorded."""
        found = {}
        for number in self.record.attempts:
            with suppress(OSError, msgspec.DecodeError):
                path = self.record.run_dir / ABOUT_DIR / attempt_path(Path(), number).name
                found[number] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return found

    @cached_property
    def kernel_rows(self) -> list[dict[str, Any]]:
        """Lines of kernels.jsonl."""
        return list(_json_lines(self.record.run_dir / KERNELS_FILE))

    @cached_property
    def ledger_lines(self) -> list[dict[str, Any]]:
        """Lines of ledger.jsonl."""
        lines = _json_lines(self.record.run_dir / LEDGER_FILE)
        return [line for line in lines if isinstance(line.get("step"), int)]

    @cached_property
    def samples(self) -> Mapping[str, list[dict[str, Any]]]:
        """Samples of the first machines, by the name of the file."""
        return {path.stem: list(_json_lines(path)) for path in self._node_files[:MOST_NODES]}

    @property
    def num_nodes(self) -> int:
        """Machines that took samples."""
        return len(self._node_files)

    @cached_property
    def _node_files(self) -> list[Path]:
        files = (self.record.run_dir / SYSTEM_DIR).glob("*.jsonl")
        return sorted(files, key=lambda path: (len(path.name), path.name))

    @cached_property
    def kept_steps(self) -> set[int]:
        """Return steps of the checkpoints that exist on disk."""
        paths = complete_checkpoints(checkpoints_dir(self.record.run_dir))
        return {int(path.name.rpartition("_")[2]) for path in paths}

    def last_sign_unix(self) -> float:
        """Return the time of the newest attempt's last heartbeat or recorded end; 0 without one."""
        if not self.record.attempts:
            return 0.0
        trace = trace_of(attempt_path(self.record.run_dir, max(self.record.attempts)))
        return trace[0] / 1e9 if trace else 0.0


def read_reported(run_dirs: Sequence[Path]) -> list[ReportedRun]:
    """Read the runs of a page.

    Raises:
        DataError: a directory does not exist or has no run, or one is given twice.
        ConfigError: a run's config.toml is not a recipe.
    """
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise DataError("a run is given twice; give each run's directory once")
    for path in run_dirs:
        _require_run(path)
    records = [read_run(path) for path in run_dirs]
    labels = _labels(records)
    return [
        _reported(index, label, record)
        for index, (label, record) in enumerate(zip(labels, records, strict=True))
    ]


def _require_run(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist; give the directory of a run (run.dir)")
    if not path.is_dir():
        raise DataError(f"{path} is a file; give the directory of a run (run.dir)")
    if not (path / CONFIG_FILE).exists():
        runs = sorted(found.parent for found in path.glob(f"*/{CONFIG_FILE}"))
        inside = f", for example {runs[0]}" if runs else ""
        raise DataError(
            f"{path} is not a run: it has no {CONFIG_FILE}; give the directory of a run (run.dir)"
            f"{inside}"
        )


def _reported(index: int, label: str, record: RunRecord) -> ReportedRun:
    state, problems = _newest_state(record.run_dir)
    return ReportedRun(
        index=index,
        label=label,
        colour=run_colour(index),
        record=record,
        goodput=goodput_of(record),
        state=state,
        problems=tuple(problems),
    )


def _newest_state(run_dir: Path) -> tuple[RunState | None, list[str]]:
    states: list[RunState] = []
    problems: list[str] = []
    newest = latest_checkpoint(checkpoints_dir(run_dir))
    for read in (lambda: newest and read_state(newest), lambda: read_roll_back(run_dir)):
        try:
            found = read()
        except Phi4Error as error:
            problems.append(str(error))
        else:
            states += [found] if found else []
    # After a recent rollback the newest checkpoint does not contain it yet.
    return max(states, key=lambda state: state.roll_backs, default=None), problems


def _labels(records: Sequence[RunRecord]) -> list[str]:
    names = [record.recipe.run.name or record.run_dir.resolve().name for record in records]
    is_clear = len(set(names)) == len(names)
    return names if is_clear else [str(record.run_dir) for record in records]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Return the objects of a file; incomplete lines are skipped, and a missing file is empty."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        with suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line, type=dict[str, Any])
