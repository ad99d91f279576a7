"""metrics.jsonl: the record of a run, one JSON object per step, steps increasing.

A line counts once its newline is written, so a kill costs at most the line being written. JSON has
no NaN and no infinity; they are the strings "NaN", "Infinity" and "-Infinity", which `float` of
Python and `Number` of JavaScript turn back.
"""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from phi4.errors import DataError, DiskFullError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class StepLog:
    """Writes a run's metrics.jsonl; a `Tracker`.

    While the disk has no space, lines are kept in memory and written once it has: training costs
    more than to wait for somebody who frees it.

    Args:
        path: created with its directory.
        resume_step: the step that training goes on from. What is recorded of later steps is cut
            off, for it happens again; 0 starts the file anew.
        say: takes one line for the console.

    Raises:
        DataError: a line of the file is not a step's object.
    """

    def __init__(
        self, path: Path, resume_step: int = 0, say: Callable[[str], None] = print
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what the disk did not take stays in `_unwritten`, in order.
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._path, self._say = path, say
        self._unwritten = b""
        self._last_step = -1
        self.rewind(resume_step)

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """The recipe lies beside the file."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's line before this returns, or keep it while the disk is full."""
        assert step > self._last_step, f"step {step} is logged after step {self._last_step}"
        self._last_step = step
        line = {"step": step, **{key: _to_json(value) for key, value in metrics.items()}}
        was_full = bool(self._unwritten)
        self._unwritten += msgspec.json.encode(line) + b"\n"
        self._write()
        if bool(self._unwritten) != was_full:
            self._say(
                f"{self._path} has all steps again"
                if was_full
                else f"{self._path}: no space on the disk; steps are kept in memory, free some"
            )

    def rewind(self, step: int) -> None:
        """Cut off what is recorded of later steps, for they happen again; 0 cuts everything.

        Raises:
            DataError: a line of the file is not a step's object.
        """
        self._last_step, size = -1, 0
        if step > 0:
            for found, end in _steps(self._path):
                if found > step:
                    break
                self._last_step, size = found, end
        # A line that the disk took in part goes on in memory.
        behind = self._path.read_bytes()[size:] + self._unwritten if self._unwritten else b""
        # One system call: a kill leaves the file either as it was or as it should be.
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
                f"{self._path}: no space for its last {len(self._unwritten)} bytes; free some and "
                "start the run again from its last checkpoint"
            )

    def _write(self) -> None:
        """Write as much as the disk takes."""
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl, in order; a last line without its newline does not count.

    Raises:
        DataError: the file is missing, or a line is not a step's object.
    """
    return [{key: _from_json(v) for key, v in line.items()} for line, _ in _lines(path)]


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


def _from_json(value: float | str) -> float:
    return float(value) if isinstance(value, str) else value
