"""Rows of JSON Lines files, plain or compressed: the one reader of the tokenizer and the screens.

At most a limit of bytes of a line is ever in memory, and a line that is no JSON object is an error
of its own kind, with a reason to file it under.
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
"""Names of JSON Lines, in lower case."""
JSON_SUFFIXES = tuple(f".json{packed}" for packed in _COMPRESSIONS)
"""Names that stand for JSON Lines as often as for a single JSON value."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

MAX_ROW_BYTES = 32 << 20
"""A longer row is no document: it is a file that lost its line breaks."""

_SHOWN_BYTES = 1000


class RowError(DataError):
    """A row cannot be used; the message is the reason that goes with it into quarantine."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one clear line.

    Raises:
        DataError: the file cannot be read or decompressed.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); check the file") from None


def open_lines(path: str | Path) -> BufferedIOBase:
    """A stream of a file's bytes, decompressed as its suffix says."""
    name = str(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(name)
    if suffix == ".bz2":
        return bz2.open(name)
    if suffix == ".zst":
        # Unlike the common binding, arrow's stream does not take a truncated file for a short one.
        return BufferedReader(arrow(name).input_stream(name, compression="zstd"))
    return open(name, "rb")


def read_lines(
    stream: BinaryIO | BufferedIOBase, max_bytes: int = MAX_ROW_BYTES, end: int = 0
) -> Iterator[tuple[bytes, int]]:
    """Each line without its break, and its length in bytes.

    Args:
        stream: at the begin of a line.
        max_bytes: of a longer line, only the first bytes come, and its real length.
        end: lines that begin there or later are left to others; 0 reads to the end.
    """
    while not end or stream.tell() < end:
        # With room for \r\n, so that a line without a break is one beyond the limit.
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
    """Read to the end of the line; returns its bytes without the break."""
    num_bytes = 0
    while piece := stream.readline(1 << 20):
        num_bytes += len(piece.rstrip(b"\r\n"))
        if piece.endswith(b"\n"):
            break
    return num_bytes


def parse_row(line: bytes, num_bytes: int, max_bytes: int = MAX_ROW_BYTES) -> dict[str, object]:
    """The JSON object of a line as `read_lines` gives it.

    What Python's json module writes is read too: NaN, Infinity and integers of any length. So is a
    line that begins with a byte order mark.

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
    """pyarrow, which an extra brings.

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
    """The value of a line that is not strict JSON; what is wrong with it otherwise is `reason`."""
    try:
        text = line.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 at byte {error.start}") from None
    try:
        row = json.loads(text, parse_int=_number)
        # Unlike the decoder, the encoder finds a lone surrogate.
        msgspec.json.encode(row)
    except (ValueError, RecursionError):
        raise RowError(reason) from None
    return row


def _number(digits: str) -> int | float:
    """Python refuses to make an int of thousands of digits; no text is lost in a float."""
    return int(digits) if len(digits) < 20 else float(digits)
