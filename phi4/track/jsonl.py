"""metrics.jsonl: the record of a run, one JSON object per step, steps increasing.

A line counts once its newline is written, so a kill costs at most the line being written. JSON has
no NaN and no infinity; they are the strings "NaN", "Infinity" and "-Infinity", which `float` of
Python and `Number` of JavaScript turn back.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from phi4.errors import DataError
from phi4.track.record import Status

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Writes a run's metrics.jsonl; a `Tracker`.

    Args:
        path: created with its directory.
        resume_step: the step that training goes on from. What is recorded of later steps is cut
            off, for it happens again; 0 starts the file anew.

    Raises:
        DataError: a line of the file is not a step's object.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab")
        self._last_step = -1
        size = 0
        if resume_step > 0:
            for step, end in _steps(path):
                if step > resume_step:
                    break
                self._last_step, size = step, end
        # One system call: a kill leaves the file either as it was or as it should be.
        os.ftruncate(self._file.fileno(), size)

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """The recipe lies beside the file."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's line, at the latest when this returns."""
        assert step > self._last_step, f"step {step} is logged after step {self._last_step}"
        self._last_step = step
        line = {"step": step, **{key: _to_json(value) for key, value in metrics.items()}}
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()

    def finish(self, status: Status) -> None:
        """Close the file."""
        self._file.close()


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
