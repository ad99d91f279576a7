"""Inputs as documents: rows of JSON Lines and parquet, text files and source trees.

Inputs are cut into parts that any process can read alone, the same parts for any number of
processes. A row that cannot be used is a value with a reason, never an exception and never a skip.
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
from phi4.data.vocabulary.chat import Conversation, read_conversation
from phi4.errors import DataError

BLANK = "no text"

TEXT_COLUMN = "text"
CONVERSATION = "messages"
"""Column that stands for a conversation, under whatever columns it lies."""
_CHAT_COLUMNS = (CONVERSATION, "prompt", "completion")

_DIVISIBLE = (".jsonl", ".ndjson", ".json")
"""Names of uncompressed lines, which can be read from any byte on."""


class Part(msgspec.Struct, frozen=True):
    """What one task reads.

    Attributes:
        files: one file of rows, or whole text files.
        begin, end: bytes of uncompressed lines that begin there, rows of parquet; otherwise 0.
        num_bytes: of the files, for progress.
    """

    files: tuple[InputFile, ...]
    begin: int
    end: int
    num_bytes: int


@dataclass(frozen=True)
class Row:
    """A document, or the reason why there is none.

    Attributes:
        path: the input.
        number: line or row from 1, counted from the begin of the part; 0 for a whole file.
        content: text or conversation, None for a bad row.
        reason: why it is bad.
    """

    path: str
    number: int
    content: str | Conversation | None
    reason: str = ""


def list_parts(files: Sequence[InputFile], part_bytes: int | None = None) -> list[Part]:
    """Cut inputs into parts, in their order.

    Args:
        files: from `find_inputs`.
        part_bytes: size of a part, about; None takes a 256th of the inputs, 4 to 32 MB, so that
            few inputs still make parts for many processes.

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


def read_rows(part: Part, text_column: str | None = None) -> Iterator[Row]:
    """All rows of a part in order.

    Args:
        part: from `list_parts`.
        text_column: column that holds the text. None takes `text`, or a conversation under
            `messages` or `prompt` and `completion`, and refuses a row that holds both; `messages`
            takes the conversation of such a row.

    Raises:
        DataError: a file cannot be read or decompressed.
    """
    for file in part.files:
        path = file.path
        with reading(path):
            match form_of(path):
                case Form.PARQUET:
                    yield from _parquet_rows(path, part, text_column)
                case Form.LINES:
                    yield from _line_rows(path, part, text_column)
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


def _whole_file(path: str) -> Row:
    content = Path(path).read_bytes().removeprefix(BYTE_ORDER_MARK)
    if len(content) > MAX_ROW_BYTES:
        return Row(path, 0, None, f"{len(content)} bytes; at most {MAX_ROW_BYTES} are read")
    try:
        return _text_row(path, 0, content.decode())
    except UnicodeDecodeError as error:
        return Row(path, 0, None, f"invalid UTF-8 at byte {error.start}")


def _line_rows(path: str, part: Part, text_column: str | None) -> Iterator[Row]:
    with open_lines(path) as stream:
        if part.begin:
            # The line that begins before this part belongs to the one before.
            stream.seek(part.begin - 1)
            skip_line(stream)
        lines = read_lines(stream, MAX_ROW_BYTES, part.end)
        for number, (line, num_bytes) in enumerate(lines, start=1):
            if not line.strip():
                yield Row(path, number, None, BLANK)
                continue
            try:
                row = parse_row(line, num_bytes, MAX_ROW_BYTES)
            except RowError as error:
                yield Row(path, number, None, str(error))
            else:
                yield _column_row(path, number, row, text_column)


def _column_row(path: str, number: int, row: dict, text_column: str | None) -> Row:
    text = row.get(text_column or TEXT_COLUMN)
    if text_column is None and text is not None and _has_conversation(row):
        return Row(
            path,
            number,
            None,
            f"holds {TEXT_COLUMN!r} and a conversation; choose with --text-field {TEXT_COLUMN} or "
            f"--text-field {CONVERSATION}",
        )
    if isinstance(text, str):
        return _text_row(path, number, text)
    if text_column == CONVERSATION or (text is None and _has_any(row, _CHAT_COLUMNS)):
        try:
            # A column that is null in this row is one that another row of the file has.
            present = {name: value for name, value in row.items() if value is not None}
            return Row(path, number, read_conversation(present))
        except DataError as error:
            return Row(path, number, None, str(error))
    column = text_column or TEXT_COLUMN
    found = ("null" if column in row else "nothing") if text is None else type(text).__name__
    return Row(path, number, None, f"expected a string under {column!r}, got {found}")


def _has_conversation(row: dict) -> bool:
    return row.get(CONVERSATION) is not None or (
        row.get("prompt") is not None and row.get("completion") is not None
    )


def _has_any(row: dict, columns: Iterable[str]) -> bool:
    return any(row.get(name) is not None for name in columns)


def _text_row(path: str, number: int, text: str) -> Row:
    if not text or text.isspace():
        return Row(path, number, None, BLANK)
    if "\0" in text:
        return Row(path, number, None, f"NUL at character {text.index(chr(0))}")
    return Row(path, number, text)


def _parquet_rows(path: str, part: Part, text_column: str | None) -> Iterator[Row]:
    columns = (text_column or TEXT_COLUMN, *_CHAT_COLUMNS)
    rows = parquet_rows(path, part.begin, part.end, columns, MAX_ROW_BYTES)
    for number, row in enumerate(rows, start=1):
        if isinstance(row, RowError):
            yield Row(path, number, None, str(row))
        else:
            yield _column_row(path, number, row, text_column)
