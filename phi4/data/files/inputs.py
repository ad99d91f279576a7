"""Which files are inputs of a tokenization, and what each of them holds.

The name says what a file holds, whatever the case of its letters; `.json` names both rows and
single values, so there the first line decides. A named file that holds none of the known forms is
an error; in a directory it is skipped and counted.
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
"""Names of files that are one document each."""

PLAN_FILE = "plan.json"
WORK_SUFFIX = ".work"

_OWN_SUFFIXES = (
    *(".rejected.jsonl", ".manifest.json", ".plan.json", ".source.json"),
    *(".bin", ".idx", ".mask", ".windows.npy"),
    *(".rejects", ".rejects.part", ".report"),
)
_HEAD_BYTES = 4096


class Form(Enum):
    """What a file holds."""

    TEXT = "text"
    LINES = "lines"
    PARQUET = "parquet"


class InputFile(msgspec.Struct, frozen=True, array_like=True):
    """An input as it was when it was found.

    Attributes:
        path: of the file.
        num_bytes: its size.
        mtime_ns: its time of change, nanoseconds since 1970.
    """

    path: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FoundInputs:
    """The files to read, in order, and how many others the directories hold, by kind."""

    files: tuple[InputFile, ...]
    skipped: Counter[str]


def form_of(path: str | Path) -> Form | None:
    """What a file of this name holds; None if the name does not say."""
    name = os.path.basename(path).lower()
    if name.endswith((*LINE_SUFFIXES, *JSON_SUFFIXES)):
        return Form.LINES
    if name.endswith(".parquet"):
        return Form.PARQUET
    return Form.TEXT if os.path.splitext(name)[1] in TEXT_SUFFIXES else None


def find_inputs(paths: Iterable[str | Path]) -> FoundInputs:
    """The input files behind paths, in their order; those of a directory in sorted order.

    Files that phi4 itself wrote are no inputs of a directory.

    Args:
        paths: files and directories.

    Raises:
        DataError: a path is missing, or a named file holds nothing that phi4 reads.
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
    """Compare sizes and times of change with those of now.

    Raises:
        DataError: names the first file that changed.
    """
    for file in files:
        now = _input_file(Path(file.path))
        if now != file:
            what = "size" if now.num_bytes != file.num_bytes else "time of change"
            raise DataError(
                f"{file.path} changed while it was read: its {what} is another than when the job "
                "began; tokenize again from inputs that nobody writes to"
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
    """The kind under which a file of a directory is counted as skipped; empty if it is read."""
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
            f"{path}: its name does not say what it holds; phi4 reads .jsonl, .ndjson and .json "
            "(also .gz, .bz2, .zst), .parquet, and text under names such as .txt: convert the "
            "file, or link it under a name that says so"
        )
    if reason := _why_not_lines(path):
        raise DataError(
            f"{path} {reason}; phi4 reads one object per line: convert it, for example with "
            "`jq -c '.[]'`, or rename it to .jsonl if only that line is damaged"
        )


def _why_not_lines(path: Path) -> str:
    """Why a .json file does not hold one object per line; empty if it does, or has another name."""
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
        return "has a first line that is not a whole object"
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
