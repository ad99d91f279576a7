"""Find the input files of a tokenization, and determine their formats.

The suffix determines the format, ignoring case; `.json` may be rows or a single value, so there the
first line decides. A file given explicitly whose format is unknown is an error; in a directory it
is skipped and counted.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

import msgspec

from phi4.data.files.atomic_files import is_temporary
from phi4.data.files.jsonl import (
    BYTE_ORDER_MARK,
    JSON_SUFFIXES,
    LINE_SUFFIXES,
    RowError,
    open_lines,
    parse_row,
    reading,
)
from phi4.errors import DataError

TEXT_SUFFIXES = frozenset(
    {".md", ".rst", ".tex", ".txt"}
    | {".c", ".cc", ".cpp", ".cs", ".cu", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".kt", ".lua"}
    | {".php", ".pl", ".py", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts"}
)
"""Suffixes of files that are one document each."""

PLAN_FILE = "plan.json"
WORK_SUFFIX = ".work"

_OWN_SUFFIXES = (
    *(".rejected.jsonl", ".manifest.json", ".plan.json", ".source.json"),
    *(".bin", ".idx", ".mask", ".windows.npy"),
    *(".rejects", ".rejects.part", ".report"),
)
_HEAD_BYTES = 4096


class Form(Enum):
    """Format of a file."""

    TEXT = "text"
    LINES = "lines"
    PARQUET = "parquet"


class InputFile(msgspec.Struct, frozen=True, array_like=True):
    """An input file with size and modification time when it was found.

    Attributes:
        path: path of the file.
        num_bytes: its size.
        mtime_ns: modification time, nanoseconds since 1970.
    """

    path: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FoundInputs:
    """The files to read, in order, and the number of other files in the directories, by kind."""

    files: tuple[InputFile, ...]
    skipped: Counter[str]


def form_of(path: str | Path) -> Form | None:
    """Return the format of a file by its name; None if the name does not determine it."""
    name = os.path.basename(path).lower()
    if name.endswith((*LINE_SUFFIXES, *JSON_SUFFIXES)):
        return Form.LINES
    if name.endswith(".parquet"):
        return Form.PARQUET
    return Form.TEXT if os.path.splitext(name)[1] in TEXT_SUFFIXES else None


def find_inputs(paths: Iterable[str | Path]) -> FoundInputs:
    """Find the input files under paths, in order; those of a directory in sorted order.

    Files written by phi4 itself are skipped in directories.

    Args:
        paths: files and directories.

    Raises:
        DataError: a path is missing, or a file given explicitly has an unknown format.
    """
    files: list[InputFile] = []
    skipped: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            files.extend(map(_input_file, sorted(_in_directory(path, skipped))))
        else:
            files.append(_input_file(path))
            _require_readable_form(path)
    return FoundInputs(tuple(files), skipped)


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Check that sizes and modification times are unchanged.

    Raises:
        DataError: names the first file that changed.
    """
    for file in files:
        now = _input_file(Path(file.path))
        if now != file:
            what = "size" if now.num_bytes != file.num_bytes else "modification time"
            raise DataError(
                f"{file.path} changed while it was read: its {what} differs from the start of the "
                f"job; tokenize again while no process writes to the inputs"
            )


def _in_directory(directory: Path, skipped: Counter[str]) -> Iterator[Path]:
    for root, below, names in os.walk(directory, onerror=_raise):
        below[:] = [name for name in below if not _is_work_directory(Path(root, name))]
        for path in (Path(root, name) for name in names):
            if not path.is_file():
                continue
            reason = _why_skipped(path)
            if reason:
                skipped[reason] += 1
            else:
                yield path


def _why_skipped(path: Path) -> str:
    """Return the kind under which a file of a directory is counted as skipped; empty if it is
    read."""
    name = path.name.lower()
    if name.endswith(_OWN_SUFFIXES) or is_temporary(name):
        return "written by phi4"
    if form_of(path) is None:
        suffixes = path.suffixes[-2 if name.endswith((".gz", ".bz2", ".zst", ".xz")) else -1 :]
        return "".join(suffixes).lower() or "no suffix"
    return "JSON but not Lines" if _why_not_lines(path) else ""


def _require_readable_form(path: Path) -> None:
    if form_of(path) is None:
        raise DataError(
            f"{path}: its name does not determine its format; supported are .jsonl, .ndjson and "
            f".json (also .gz, .bz2, .zst), .parquet, and text under names such as .txt: convert "
            f"the file, or link it under such a name"
        )
    if reason := _why_not_lines(path):
        raise DataError(
            f"{path} {reason}; expected one object per line; convert it, for example with "
            "`jq -c '.[]'`, or rename it to .jsonl if only that line is damaged"
        )


def _why_not_lines(path: Path) -> str:
    """Return why a .json file is not JSON Lines; empty if it is, or has another suffix."""
    if not path.name.lower().endswith(JSON_SUFFIXES):
        return ""
    with reading(path), open_lines(path) as stream:
        head = stream.read(_HEAD_BYTES)
    rows = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if rows and not rows.startswith(b"{"):
        return f"begins with {rows[:1]!r}, not with an object"
    line, line_break, _ = rows.partition(b"\n")
    try:
        if line and (line_break or len(head) < _HEAD_BYTES):
            parse_row(line, len(line))
    except RowError:
        return "has a first line that is not a complete object"
    return ""


def _is_work_directory(path: Path) -> bool:
    return path.name.endswith(WORK_SUFFIX) and (path / PLAN_FILE).exists()


def _input_file(path: Path) -> InputFile:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    return InputFile(str(path), stat.st_size, stat.st_mtime_ns)


def _raise(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}); check the path") from None
