"""Read input files as rows: JSON Lines, parquet, and text files as one row each.

Inputs are split into parts that any process can read independently, the same parts for any number
of processes. A row that cannot be read becomes a value with a reason; it is neither raised as an
exception nor skipped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import msgspec

from phi4.data.files.inputs import Form, InputFile, form_of
from phi4.data.files.jsonl import (
    BYTE_ORDER_MARK,
    MAX_ROW_BYTES,
    RowError,
    open_lines,
    parse_row,
    read_lines,
    reading,
    skip_line,
)
from phi4.data.files.parquet import parquet_cuts, parquet_rows

BLANK = "no text"
"""Reason of an empty line, which is not an error."""

_DIVISIBLE = (".jsonl", ".ndjson", ".json")
"""Suffixes of uncompressed line files, which can be read from any byte on."""


class Part(msgspec.Struct, frozen=True):
    """The unit of work of one task.

    Attributes:
        files: one file of rows, or several complete text files.
        begin, end: byte range in which lines begin, for uncompressed lines; rows, for parquet;
            otherwise 0.
        num_bytes: size of the files, for progress.
    """

    files: tuple[InputFile, ...]
    begin: int
    end: int
    num_bytes: int


@dataclass(frozen=True)
class InputRow:
    """A row, or the reason why it cannot be read.

    Attributes:
        path: the input.
        number: line or row from 1, counted from the beginning of the part; 0 for an entire file.
        content: columns by name, the text of a text file, None for a bad row.
        reason: why it is bad.
    """

    path: str
    number: int
    content: dict[str, object] | str | None
    reason: str = ""


def list_parts(files: Sequence[InputFile], part_bytes: int | None = None) -> list[Part]:
    """Split inputs into parts, in order.

    Args:
        files: from `find_inputs`.
        part_bytes: approximate size of a part; None takes 1/256 of the inputs, between 4 and 32 MB,
            so that few inputs still make parts for many processes.

    Raises:
        DataError: parquet metadata is damaged.
    """
    if part_bytes is None:
        part_bytes = min(max(sum(file.num_bytes for file in files) // 256, 4 << 20), 32 << 20)
    parts: list[Part] = []
    for is_text, group in groupby(files, key=lambda file: form_of(file.path) is Form.TEXT):
        if is_text:
            parts.extend(_text_parts(group, part_bytes))
        else:
            parts.extend(part for file in group for part in _row_parts(file, part_bytes))
    return parts


def read_input_rows(part: Part, columns: Sequence[str]) -> Iterator[InputRow]:
    """Read all rows of a part in order.

    Args:
        part: from `list_parts`.
        columns: columns of parquet to read; a line has all of its keys.

    Raises:
        DataError: a file cannot be read or decompressed.
    """
    for file in part.files:
        path = file.path
        with reading(path):
            match form_of(path):
                case Form.PARQUET:
                    rows = parquet_rows(path, part.begin, part.end, columns, MAX_ROW_BYTES)
                    for number, row in enumerate(rows, start=1):
                        yield _input_row(path, number, row)
                case Form.LINES:
                    yield from _line_rows(path, part)
                case _:
                    yield _whole_file(path)


def _text_parts(files: Iterable[InputFile], part_bytes: int) -> Iterator[Part]:
    taken: list[InputFile] = []
    num_bytes = 0
    for file in files:
        taken.append(file)
        num_bytes += file.num_bytes
        if num_bytes >= part_bytes:
            yield Part(tuple(taken), 0, 0, num_bytes)
            taken, num_bytes = [], 0
    if taken:
        yield Part(tuple(taken), 0, 0, num_bytes)


def _row_parts(file: InputFile, part_bytes: int) -> Iterator[Part]:
    count = max(1, -(-file.num_bytes // part_bytes))
    if form_of(file.path) is Form.PARQUET:
        cuts = parquet_cuts(file.path, count)
    elif file.path.lower().endswith(_DIVISIBLE):
        cuts = [file.num_bytes * i // count for i in range(count + 1)]
    else:
        cuts = [0, 0]
    for begin, end in pairwise(cuts):
        yield Part((file,), begin, end, file.num_bytes // (len(cuts) - 1))


def _input_row(path: str, number: int, row: dict[str, object] | RowError) -> InputRow:
    if isinstance(row, RowError):
        return InputRow(path, number, None, str(row))
    return InputRow(path, number, row)


def _whole_file(path: str) -> InputRow:
    content = Path(path).read_bytes().removeprefix(BYTE_ORDER_MARK)
    if len(content) > MAX_ROW_BYTES:
        return InputRow(path, 0, None, f"{len(content)} bytes; at most {MAX_ROW_BYTES} are read")
    try:
        return InputRow(path, 0, content.decode())
    except UnicodeDecodeError as error:
        return InputRow(path, 0, None, f"invalid UTF-8 at byte {error.start}")


def _line_rows(path: str, part: Part) -> Iterator[InputRow]:
    with open_lines(path) as stream:
        if part.begin:
            # The line that begins before this part belongs to the previous part.
            stream.seek(part.begin - 1)
            skip_line(stream)
        lines = read_lines(stream, MAX_ROW_BYTES, part.end)
        for number, (line, num_bytes) in enumerate(lines, start=1):
            if not line.strip():
                yield InputRow(path, number, None, BLANK)
                continue
            row: dict[str, object] | RowError
            try:
                row = parse_row(line, num_bytes, MAX_ROW_BYTES)
            except RowError as error:
                row = error
            yield _input_row(path, number, row)
