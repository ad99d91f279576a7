"""Read raw rows for the filters: lines, and the text in a line.

Reading and parsing are separate, so that one process can read while others parse; a bad line is a
value with a reason, neither an exception that ends the stream nor skipped. A row of parquet is
converted to the equivalent line of JSON.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phi4.data.files import jsonl
from phi4.data.files.inputs import Form, form_of
from phi4.data.files.jsonl import MAX_ROW_BYTES, RowError
from phi4.data.files.parquet import open_parquet

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_CHAT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 64  # The metadata underestimates texts that repeat and are stored in a dictionary.
_SHOWN_BYTES = 1000


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Attributes:
        text_field: column of the text.
        max_bytes: longer rows are bad, and not held in memory if the file is line-based.
    """

    text_field: str = "text"
    max_bytes: int = MAX_ROW_BYTES

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the columns that contain text for the model."""
        return tuple(dict.fromkeys((self.text_field, *_CHAT_COLUMNS)))


DEFAULT_FORMAT = RowFormat()


@dataclass(frozen=True)
class Line:
    """One line of an input.

    Attributes:
        path: the input.
        number: line number, or row of parquet, from 1.
        raw: its bytes without the line break; truncated for a line over the limit.
        num_bytes: its real length.
    """

    path: Path
    number: int
    raw: bytes
    num_bytes: int


def read_lines(paths: Iterable[Path], row_format: RowFormat = DEFAULT_FORMAT) -> Iterator[Line]:
    """Read lines of files of rows in order; blank lines are skipped.

    At most `row_format.max_bytes` of a line, and a batch of 8 MB of parquet, are ever in memory.

    Raises:
        DataError: a file cannot be read.
    """
    for path in map(Path, paths):
        with jsonl.reading(path):
            if form_of(path) is Form.PARQUET:
                yield from _parquet_lines(path, row_format)
                continue
            with jsonl.open_lines(path) as stream:
                read = jsonl.read_lines(stream, row_format.max_bytes)
                for number, (raw, num_bytes) in enumerate(read, start=1):
                    if raw.strip():
                        yield Line(path, number, raw, num_bytes)


def parse(line: Line, row_format: RowFormat = DEFAULT_FORMAT) -> dict[str, object]:
    """Parse the JSON object of a line.

    Raises:
        RowError: the line is too long, not UTF-8, or not a JSON object.
    """
    return jsonl.parse_row(line.raw, line.num_bytes, row_format.max_bytes)


def text_of(row: Mapping[str, object], row_format: RowFormat = DEFAULT_FORMAT) -> str:
    """Return all text of a row: its text column, or the contents of its chat columns.

    Raises:
        RowError: it has no text, or a NUL character.
    """
    columns = row_format.text_columns
    parts = [
        part
        for name in columns
        for part in _strings(row.get(name), name, may_be_list=name in _CHAT_COLUMNS)
    ]
    if not parts:
        raise RowError(f"none of {', '.join(columns)} holds text")
    text = "\n".join(parts)
    if "\0" in text:
        raise RowError(f"NUL at character {text.index(chr(0))}")
    return text


def shown(line: Line) -> str:
    """Return a line as text, with invalid UTF-8 bytes as escapes."""
    return line.raw.decode("utf-8", "backslashreplace")


def _strings(value: object, name: str, may_be_list: bool) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and may_be_list:
        for message in value:
            content = message.get("content") if isinstance(message, dict) else None
            if not isinstance(content, str):
                raise RowError(f"{name} has a message without a content string")
            yield content
    else:
        raise RowError(f"{name} is {type(value).__name__}, not text")


def _parquet_lines(path: Path, row_format: RowFormat) -> Iterator[Line]:
    with open_parquet(str(path)) as file:
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group)
            row_bytes = size.total_byte_size // max(1, size.num_rows) + 1
            num_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
            for batch in file.iter_batches(num_rows, row_groups=[group]):
                for raw in _json_rows(_text_as_strings(batch, row_format)):
                    number += 1
                    too_long = len(raw) > row_format.max_bytes
                    yield Line(path, number, raw[:_SHOWN_BYTES] if too_long else raw, len(raw))


def _text_as_strings(batch: "RecordBatch", row_format: RowFormat) -> "RecordBatch":
    """Return the same rows with bytes of text as strings, which JSON would encode as base64."""
    from pyarrow import large_string, string, types

    for index, column in enumerate(batch.schema):
        is_large = types.is_large_binary(column.type)
        if column.name in row_format.text_columns and (is_large or types.is_binary(column.type)):
            # Reinterpreted as strings, not converted: invalid UTF-8 is detected when a row is read.
            text = batch.column(index).view(large_string() if is_large else string())
            batch = batch.set_column(index, column.name, text)
    return batch


def _json_rows(batch: "RecordBatch") -> Iterator[bytes]:
    """Return rows as JSON; invalid UTF-8 as the bytes themselves, which cannot be parsed."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error.object
        else:
            for index in range(batch.num_rows):
                yield from _json_rows(batch.slice(index, 1))
    else:
        for row in rows:
            yield msgspec.json.encode(row, enc_hook=str)
