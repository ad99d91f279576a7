"""Read new lines of a run's metrics.jsonl, even if lines are cut off meanwhile.

A rollback truncates the file in place and training continues writing, so the size is not
sufficient: the last line that was read must still be at its position, and lines are unique because
of their times.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from phi4.errors import DataError
from phi4.rundir.step_log import decode_line

_CHUNK_BYTES = 4 << 20


class Place(NamedTuple):
    """Position in a record.

    Attributes:
        offset: offset in the file.
        last_line: the line that ends there.
    """

    offset: int = 0
    last_line: bytes = b""


class RecordTail:
    """Reads a metrics.jsonl incrementally.

    Args:
        path: file that may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, place: Place) -> tuple[list[dict[str, Any]], Place]:
        """Return the complete lines after a position, and the position after them.

        If the file was cut before the position, reading restarts at its first line.

        Raises:
            DataError: a line is not a step's object.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return [], Place()
        try:
            start = place.offset - len(place.last_line)
            found = os.pread(descriptor, len(place.last_line) + _CHUNK_BYTES, start)
            if not found.startswith(place.last_line):
                place = Place()
                found = os.pread(descriptor, _CHUNK_BYTES, 0)
            written_at = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
        return self._decoded(found[len(place.last_line) :], place, written_at)

    def _decoded(
        self, found: bytes, place: Place, written_at: float
    ) -> tuple[list[dict[str, Any]], Place]:
        whole = found[: found.rfind(b"\n") + 1]
        if not whole:
            if len(found) == _CHUNK_BYTES:
                raise DataError(f"{self._path} has a line of more than {_CHUNK_BYTES:,} bytes")
            return [], place
        texts = whole.splitlines(keepends=True)
        lines = [decode_line(text, str(self._path)) for text in texts]
        # Lines of version 0.1 have no time.
        dated = [{"unix_seconds": written_at, **line} for line in lines]
        return dated, Place(place.offset + len(whole), texts[-1])
