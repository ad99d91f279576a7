"""Read rows of JSON Lines files, plain or compressed; used by the tokenizer and the screens.

Only a limited number of bytes of a line is held in memory, and a line that is not a JSON object
raises an error of its own type, with the reason for the quarantine.
"""

import bz2
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import msgspec

from phi4.errors import DataError, PlatformError

_COMPRESSIONS = ("", ".gz", ".zst", ".bz2")
LINE_SUFFIXES = tuple(name + packed for name in (".jsonl", ".ndjson") for packed in _COMPRESSIONS)
"""Suffixes of JSON Lines, in lower case."""
JSON_SUFFIXES = tuple(f".json{packed}" for packed in _COMPRESSIONS)
"""Suffixes used both for JSON Lines and for a single JSON value."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

MAX_ROW_BYTES = 32 << 20
"""A longer row is not a document but a file that lost its line breaks."""

_SHOWN_BYTES = 1000


class RowError(DataError):
    """A row cannot be used; the message is the reason recorded in the quarantine."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Convert errors of reading a file to a one-line error.

    Raises:
        DataError: the file cannot be read or decompressed.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); check the file") from None


def open_lines(path: str | Path) -> BufferedIOBase:
    """Open a file's bytes, decompressed according to its suffix."""
    name = str(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(name)
    if suffix == ".bz2":
        return bz2.open(name)
    if suffix == ".zst":
        # Unlike the usual binding, arrow's stream reports a truncated file.
        return BufferedReader(arrow(name).input_stream(name, compression="zstd"))
    return open(name, "rb")


def placed_lines(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Yield each line of a file that is not blank: its place `PATH:NUMBER` for errors, its content
    and its length, as `read_lines`.

    Raises:
        DataError: the file cannot be read or decompressed.
    """
    with reading(path), open_lines(path) as lines:
        for number, (line, num_bytes) in enumerate(read_lines(lines), start=1):
            if line.strip():
                yield f"{path}:{number}", line, num_bytes


def read_lines(
    stream: BinaryIO | BufferedIOBase, max_bytes: int = MAX_ROW_BYTES, end: int = 0
) -> Iterator[tuple[bytes, int]]:
    """Yield each line without its break, and its length in bytes.

    Args:
        stream: positioned at the beginning of a line.
        max_bytes: a longer line is truncated to this, with its real length.
        end: lines that begin here or later are not read; 0 reads to the end.
    """
    while not end or stream.tell() < end:
        # With room for \r\n, so that a truncated line is longer than the limit.
        raw = stream.readline(max_bytes + 2)
        if not raw:
            return
        line = raw.rstrip(b"\r\n")
        num_bytes = len(line)
        if num_bytes > max_bytes:
            line = line[:_SHOWN_BYTES]
            num_bytes += 0 if raw.endswith(b"\n") else skip_line(stream)
        yield line, num_bytes


def skip_line(stream: BinaryIO | BufferedIOBase) -> int:
    """Read to the end of the line; return its bytes without the break."""
    num_bytes = 0
    while piece := stream.readline(1 << 20):
        num_bytes += len(piece.rstrip(b"\r\n"))
        if piece.endswith(b"\n"):
            break
    return num_bytes


def parse_row(line: bytes, num_bytes: int, max_bytes: int = MAX_ROW_BYTES) -> dict[str, object]:
    """Parse a line from `read_lines` as a JSON object.

    Output of Python's json module is accepted too: NaN, Infinity and integers of any length, and so
    is a line that begins with a byte order mark.

    Raises:
        RowError: the line is too long, not UTF-8, or not a JSON object.
    """
    if num_bytes > max_bytes:
        raise RowError(f"{num_bytes} bytes; at most {max_bytes} are read")
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        row = _parse_leniently(line, f"invalid JSON: {error}")
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {type(row).__name__}")
    return row


def arrow(path: str) -> ModuleType:
    """Import pyarrow, an optional dependency.

    Raises:
        PlatformError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise PlatformError(
            f"{path} needs pyarrow to be read; install it with `pip install phi4[data]`"
        ) from None
    return pyarrow


def _parse_leniently(line: bytes, reason: str) -> object:
    """Return the value of a line that is not strict JSON; `reason` is raised if it is invalid."""
    try:
        text = line.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 at byte {error.start}") from None
    try:
        row = json.loads(text, parse_int=_number)
        # Unlike the decoder, the encoder detects a lone surrogate.
        msgspec.json.encode(row)
    except (ValueError, RecursionError):
        raise RowError(reason) from None
    return row


def _number(digits: str) -> int | float:
    """Parse as float, because Python refuses ints of thousands of digits; no text is lost."""
    return int(digits) if len(digits) < 20 else float(digits)
