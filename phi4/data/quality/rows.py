"""Rows in raw form for the screens: lines, and the text that a line holds.

Reading and parsing are apart, so that one process can read while others parse; a bad line is a
value with a reason, never an exception that ends the stream and never a skip.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from phi4.data import lines
from phi4.data.lines import LINE_SUFFIXES, MAX_ROW_BYTES, RowError
from phi4.errors import DataError

_TEXT_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Line:
    """One line of an input.

    Attributes:
        path: the input.
        number: of the line, from 1.
        raw: its bytes without the line break; of a line over the limit, the first ones only.
        num_bytes: its real length.
    """

    path: Path
    number: int
    raw: bytes
    num_bytes: int


def read_lines(paths: Iterable[Path], max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Line]:
    """Lines of jsonl files in their order; blank lines are left out.

    At most `max_row_bytes` of a line are ever in memory.

    Raises:
        DataError: a file cannot be read or is not jsonl, plain, .gz or .zst.
    """
    for path in map(Path, paths):
        if not path.name.endswith(LINE_SUFFIXES):
            raise DataError(
                f"{path} is none of {', '.join(LINE_SUFFIXES)}; write the rows as jsonl"
            )
        with lines.reading(path), lines.open_lines(path) as stream:
            read = lines.read_lines(stream, max_row_bytes)
            for number, (raw, num_bytes) in enumerate(read, start=1):
                if raw.strip():
                    yield Line(path, number, raw, num_bytes)


def parse(line: Line, max_row_bytes: int = MAX_ROW_BYTES) -> dict[str, object]:
    """The JSON object of a line.

    Raises:
        RowError: the line is too long, not UTF-8, or not a JSON object.
    """
    return lines.parse_row(line.raw, line.num_bytes, max_row_bytes)


def text_of(row: Mapping[str, object]) -> str:
    """All that a model would read of a row: `text`, or the contents of its chat columns.

    Raises:
        RowError: no text is there, or it has NUL.
    """
    parts = [part for name in _TEXT_COLUMNS for part in _strings(row.get(name), name)]
    if not parts:
        raise RowError(f"none of {', '.join(_TEXT_COLUMNS)} holds text")
    text = "\n".join(parts)
    if "\0" in text:
        raise RowError(f"NUL at character {text.index(chr(0))}")
    return text


def shown(line: Line) -> str:
    """A line as text, bytes that are not UTF-8 as escapes."""
    return line.raw.decode("utf-8", "backslashreplace")


def _strings(value: object, name: str) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and name != "text":
        for message in value:
            content = message.get("content") if isinstance(message, dict) else None
            if not isinstance(content, str):
                raise RowError(f"{name} has a message without a content string")
            yield content
    else:
        raise RowError(f"{name} is {type(value).__name__}, not text")
