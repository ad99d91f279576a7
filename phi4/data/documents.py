"""Inputs as documents: jsonl (plain, .gz, .zst), parquet, text files and source trees.

Inputs are cut into parts that any process can read alone, the same parts for any number of
processes. A row that cannot be used is a value with a reason, never an exception and never a skip.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phi4.data.chat import Conversation, read_conversation
from phi4.data.lines import (
    LINE_SUFFIXES,
    MAX_ROW_BYTES,
    RowError,
    arrow,
    open_lines,
    parse_row,
    read_lines,
    reading,
    skip_line,
)
from phi4.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

TREE_SUFFIXES = frozenset(
    {".md", ".rst", ".tex", ".txt"}
    | {".c", ".cc", ".cpp", ".cs", ".cu", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".kt", ".lua"}
    | {".php", ".pl", ".py", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts"}
)
"""Files that count as text when a directory is given; a file named itself always does."""

BLANK = "no text"

_CHAT_COLUMNS = ("messages", "prompt", "completion")


class Part(msgspec.Struct, frozen=True):
    """What one task reads.

    Attributes:
        paths: one file of rows, or whole text files.
        begin, end: bytes of plain jsonl whose lines begin there, row groups of parquet.
        num_bytes: of the files, for progress.
    """

    paths: tuple[str, ...]
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


def list_parts(inputs: Iterable[str | Path], part_bytes: int | None = None) -> list[Part]:
    """Cut inputs into parts, in their order; directories in sorted path order.

    Args:
        inputs: files and directories.
        part_bytes: size of a part, about; None takes a 256th of the inputs, 4 to 32 MB, so that
            few inputs still make parts for many processes.

    Raises:
        DataError: an input is missing, or parquet metadata is damaged.
    """
    files = [(path, _size(path)) for path in _files(inputs)]
    if part_bytes is None:
        part_bytes = min(max(sum(size for _, size in files) // 256, 4 << 20), 32 << 20)
    parts: list[Part] = []
    for is_rows, group in groupby(files, key=lambda file: _is_rows(file[0])):
        if is_rows:
            parts.extend(part for file in group for part in _row_parts(*file, part_bytes))
        else:
            parts.extend(_text_parts(group, part_bytes))
    return parts


def read_rows(part: Part, text_field: str = "text") -> Iterator[Row]:
    """All rows of a part in order.

    Args:
        part: from `list_parts`.
        text_field: column that holds the text; rows without it may hold a conversation under the
            names `messages`, or `prompt` and `completion`.

    Raises:
        DataError: a file cannot be read or decompressed.
    """
    for path in part.paths:
        with reading(path):
            if path.endswith(".parquet"):
                yield from _parquet_rows(path, part, text_field)
            elif _is_rows(Path(path)):
                yield from _line_rows(path, part, text_field)
            else:
                yield _whole_file(path)


def _files(inputs: Iterable[str | Path]) -> Iterator[Path]:
    for item in map(Path, inputs):
        if not item.is_dir():
            yield item
            continue
        found = (p for p in item.rglob("*") if p.suffix in TREE_SUFFIXES or _is_rows(p))
        yield from sorted(path for path in found if path.is_file())


def _is_rows(path: Path) -> bool:
    return path.name.endswith((*LINE_SUFFIXES, ".parquet"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None


def _text_parts(files: Iterable[tuple[Path, int]], part_bytes: int) -> Iterator[Part]:
    paths: list[str] = []
    num_bytes = 0
    for path, size in files:
        paths.append(str(path))
        num_bytes += size
        if num_bytes >= part_bytes:
            yield Part(tuple(paths), 0, 0, num_bytes)
            paths, num_bytes = [], 0
    if paths:
        yield Part(tuple(paths), 0, 0, num_bytes)


def _row_parts(path: Path, size: int, part_bytes: int) -> Iterator[Part]:
    name, count = str(path), max(1, -(-size // part_bytes))
    if name.endswith(".parquet"):
        groups = _parquet(name).num_row_groups
        count = max(1, min(count, groups))
        cuts = [groups * i // count for i in range(count + 1)]
    elif name.endswith(".jsonl"):
        cuts = [size * i // count for i in range(count + 1)]
    else:
        count, cuts = 1, [0, 0]
    for begin, end in pairwise(cuts):
        yield Part((name,), begin, end, size // count)


def _whole_file(path: str) -> Row:
    content = Path(path).read_bytes()
    if len(content) > MAX_ROW_BYTES:
        return Row(path, 0, None, f"{len(content)} bytes; at most {MAX_ROW_BYTES} are read")
    try:
        return _text_row(path, 0, content.decode())
    except UnicodeDecodeError as error:
        return Row(path, 0, None, f"invalid UTF-8 at byte {error.start}")


def _line_rows(path: str, part: Part, text_field: str) -> Iterator[Row]:
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
                yield _column_row(path, number, row, text_field)


def _column_row(path: str, number: int, row: dict, text_field: str) -> Row:
    text = row.get(text_field)
    if isinstance(text, str):
        return _text_row(path, number, text)
    if text_field not in row and any(name in row for name in _CHAT_COLUMNS):
        try:
            return Row(path, number, read_conversation(row))
        except DataError as error:
            return Row(path, number, None, str(error))
    found = "nothing" if text_field not in row else type(text).__name__
    return Row(path, number, None, f"expected a string under {text_field!r}, got {found}")


def _text_row(path: str, number: int, text: str) -> Row:
    if not text or text.isspace():
        return Row(path, number, None, BLANK)
    if "\0" in text:
        return Row(path, number, None, f"NUL at character {text.index(chr(0))}")
    return Row(path, number, text)


def _parquet_rows(path: str, part: Part, text_field: str) -> Iterator[Row]:
    file = _parquet(path)
    present = set(file.schema_arrow.names)
    columns = [name for name in (text_field, *_CHAT_COLUMNS) if name in present]
    groups = list(range(part.begin, part.end))
    number = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield _column_row(path, number, row, text_field)


def _parquet(path: str) -> "ParquetFile":
    arrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these two kinds
        raise DataError(f"{path} is not a parquet file ({error}); check the file") from None
