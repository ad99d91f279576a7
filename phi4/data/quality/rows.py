"""jsonl rows in raw form: lines of bounded size, and the text that a line holds.

Reading and parsing are apart, so that one process can read while others parse; a bad line is a
value with a reason, never an exception that ends the stream and never a skip.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from phi4.data.documents import MAX_ROW_BYTES
from phi4.errors import DataError

_SHOWN_BYTES = 1000
_TEXT_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected")


class RowError(DataError):
    """A row cannot be used; the message is the reason that goes with it into quarantine."""


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
        DataError: a file cannot be read or is neither .jsonl nor .jsonl.gz.
    """
    for path in map(Path, paths):
        try:
            with _open(path) as stream:
                yield from _lines(path, stream, max_row_bytes)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{path} cannot be read ({reason}); check the file") from None


def parse(line: Line, max_row_bytes: int = MAX_ROW_BYTES) -> dict[str, object]:
    """The JSON object of a line.

    Raises:
        RowError: the line is too long, not UTF-8, or not a JSON object.
    """
    if line.num_bytes > max_row_bytes:
        raise RowError(f"line of {line.num_bytes} bytes; at most {max_row_bytes} are read")
    try:
        row = json.loads(line.raw.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"invalid JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {type(row).__name__}")
    return row


def text_of(row: Mapping[str, object]) -> str:
    """All that a model would read of a row: `text`, or the contents of its chat columns.

    Raises:
        RowError: no text is there, or it has NUL or unpaired surrogates.
    """
    parts = [part for name in _TEXT_COLUMNS for part in _strings(row.get(name), name)]
    if not parts:
        raise RowError(f"none of {', '.join(_TEXT_COLUMNS)} holds text")
    text = "\n".join(parts)
    if "\0" in text:
        raise RowError(f"NUL at character {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"lone surrogate at character {error.start}") from None
    return text


def shown(line: Line) -> str:
    """A line as text, bytes that are not UTF-8 as escapes."""
    return line.raw.decode("utf-8", "backslashreplace")


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".jsonl"):
        return path.open("rb")
    if path.name.endswith(".jsonl.gz"):
        return gzip.open(path)
    raise DataError(f"{path} is neither .jsonl nor .jsonl.gz; write the rows as jsonl")


def _lines(path: Path, stream: BinaryIO, limit: int) -> Iterator[Line]:
    number = 0
    while raw := stream.readline(limit + 1):
        number += 1
        num_bytes = len(raw.rstrip(b"\r\n"))
        if len(raw) > limit and not raw.endswith(b"\n"):
            raw = raw[:_SHOWN_BYTES]
            while tail := stream.readline(1 << 20):
                num_bytes += len(tail.rstrip(b"\r\n"))
                if tail.endswith(b"\n"):
                    break
        elif not raw.strip():
            continue
        yield Line(path, number, raw.rstrip(b"\r\n"), num_bytes)


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
