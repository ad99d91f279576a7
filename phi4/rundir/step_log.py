"""metrics.jsonl: the metrics of a run, one JSON object per step, steps increasing.

A line counts once its newline is written, so a kill loses at most the line being written. JSON has
no NaN and no infinity; they are written as the strings "NaN", "Infinity" and "-Infinity", which
Python's `float` and JavaScript's `Number` convert back.
"""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from phi4.errors import DataError, DiskFullError

UndoneBy = Literal["resume", "roll_back"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class StepLog:
    """Writes a run's metrics.jsonl; a `Tracker`.

    While the disk is full, lines are kept in memory and written once there is space again: stopping
    the training would cost more than waiting for space.

    Args:
        path: created with its directory.
        resume_step: the step that training resumes from. Records of later steps are cut off,
            because those steps are repeated; 0 starts a new file.
        say: takes one line for the console.
        undone: file that cut-off lines are moved to, with `undone_by` a resume or a rollback; None
            drops them.

    Raises:
        DataError: a line of the file is not the JSON object of a step.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int = 0,
        say: Callable[[str], None] = print,
        undone: Path | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what could not be written stays in `_unwritten`, in order.
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._path, self._say, self._undone = path, say, undone
        self._unwritten = b""
        self._last_step = -1
        self._cut(resume_step, "resume")

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """Do nothing; the recipe is stored next to the file."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's line before returning, or keep it while the disk is full."""
        assert step > self._last_step, f"step {step} was logged after step {self._last_step}"
        self._last_step = step
        line = {"step": step, **{key: _to_json(value) for key, value in metrics.items()}}
        was_full = bool(self._unwritten)
        self._unwritten += msgspec.json.encode(line) + b"\n"
        self._write()
        if bool(self._unwritten) != was_full:
            self._say(
                f"{self._path} is complete again"
                if was_full
                else (
                    f"{self._path}: no space on the disk; steps are kept in memory until space is "
                    f"freed"
                )
            )

    def rewind(self, step: int) -> None:
        """Cut off records of later steps, because those steps are repeated; 0 cuts everything.

        Raises:
            DataError: a line of the file is not a step's object.
        """
        self._cut(step, "roll_back")

    def _cut(self, step: int, by: UndoneBy) -> None:
        self._last_step, size = -1, 0
        if step > 0:
            for found, end in _steps(self._path):
                if found > step:
                    break
                self._last_step, size = found, end
        # The remainder of a partially written line stays in memory.
        behind = self._path.read_bytes()[size:] + self._unwritten if self._unwritten else b""
        self._keep_undone(size, by)
        # One system call: a kill leaves the file in either the old or the new state.
        os.ftruncate(self._file.fileno(), size)
        self._unwritten = b""
        for line in behind.splitlines(keepends=True) if step > 0 else ():
            found = _decoded(line, f"{self._path}, in memory")["step"]
            if found > step:
                break
            self._last_step, self._unwritten = found, self._unwritten + line
        self._write()

    def finish(self, status: str) -> None:
        """Close the file.

        Raises:
            DiskFullError: a finished run's lines do not fit on the disk.
        """
        self._write()
        self._file.close()
        if self._unwritten and status == "finished":
            raise DiskFullError(
                f"{self._path}: no space for its last {len(self._unwritten)} bytes; free some "
                f"space and resume the run from its last checkpoint"
            )

    def _keep_undone(self, size: int, by: UndoneBy) -> None:
        """Move complete lines after `size` to the file of undone ones, as far as there is disk
        space.

        A kill before they are cut off leaves them in both files: readers identify them by attempt,
        step and time.
        """
        if self._undone is None or self._path.stat().st_size == size:
            return
        with self._path.open("rb") as file:
            file.seek(size)
            lines = [line for line in file if line.endswith(b"}\n")]
        mark = b',"undone_by":"' + by.encode() + b'"}\n'
        with suppress(OSError), self._undone.open("ab") as file:
            file.writelines(line[:-2] + mark for line in lines)

    def _write(self) -> None:
        """Write as much as fits on the disk."""
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the steps of a metrics.jsonl, in order; a last line without its newline is ignored.

    Raises:
        DataError: the file is missing, or a line is not a step's object.
    """
    return [_with_numbers(line) for line, _ in _lines(path)]


def decode_line(line: bytes, where: str) -> dict[str, float]:
    """Decode one complete line.

    Args:
        line: line of a metrics.jsonl.
        where: names the line in the error.

    Raises:
        DataError: it is not a step's object.
    """
    return _with_numbers(_decoded(line, where))


def read_undone(path: Path) -> list[dict[str, Any]]:
    """Read the lines of an undone.jsonl, each once, in the order in which their steps ended; none
    if it does not exist."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with suppress(msgspec.DecodeError):
            text = msgspec.json.decode(line, type=dict[str, Any])
            by = text.pop("undone_by", "")
            entry = {key: _from_json(value) for key, value in text.items()} | {"undone_by": by}
            found[tuple(entry.get(key) for key in ("attempt", "step", "unix_seconds"))] = entry
    return list(found.values())


def _steps(path: Path) -> Iterator[tuple[int, int]]:
    """Step and end offset of every line."""
    for line, end in _lines(path):
        yield line["step"], end


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; give the directory of a run that trained"
        ) from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield _decoded(line, f"{path}:{number}"), end


def _decoded(line: bytes, where: str) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(line)
    except msgspec.DecodeError:
        decoded = None
    if not isinstance(decoded, dict) or not isinstance(decoded.get("step"), int):
        raise DataError(f"{where} is not the JSON object of a step: {line[:60]!r}; remove the line")
    return decoded


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _with_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: _from_json(value) for key, value in line.items()}


def _from_json(value: float | str) -> float:
    return float(value) if isinstance(value, str) else value
