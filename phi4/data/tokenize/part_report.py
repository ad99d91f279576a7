"""The result of each part: its counts, and its rejected rows with reasons."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from phi4.data.files.input_rows import Part
from phi4.data.files.inputs import Form, form_of
from phi4.data.files.jsonl import reading
from phi4.data.files.rejections import RejectedRow, num_faults, write_rejected_rows

_BLOCK_BYTES = 1 << 20


class PartReport(msgspec.Struct, frozen=True, kw_only=True):
    """A finished part."""

    num_runs: int
    num_rows: int
    num_documents: int
    num_tokens: int
    masked: bool
    rejected: tuple[RejectedRow, ...]

    @property
    def num_rejected(self) -> int:
        """Bad rows; blank ones are not errors."""
        return num_faults(self.rejected)


def write_rejections(
    path: str | Path, parts: Sequence[Part], reports: Mapping[int, PartReport]
) -> int:
    """Write all rejections, with line numbers of the entire file; return how many.

    With no rejections, no file is left.

    Args:
        path: path of the list.
        parts: all parts of the plan, finished or not.
        reports: reports of finished parts, by index.
    """
    rejecting = {
        parts[index].files[0].path: index for index in sorted(reports) if reports[index].rejected
    }
    lines: list[RejectedRow] = []
    before = 0
    for index, part in enumerate(parts):
        source, report = part.files[0].path, reports.get(index)
        before = before if part.begin else 0
        if report is not None:
            lines.extend(_in_file(row, before) for row in report.rejected)
            before += report.num_rows
        elif index < rejecting.get(source, 0):
            before += _num_rows(source, part)
    write_rejected_rows(path, lines)
    return len(lines)


def _in_file(row: RejectedRow, before: int) -> RejectedRow:
    """Return a rejection of a part with its line in the file; `before` lines are in earlier
    parts."""
    return RejectedRow(row.input, row.line + before if row.line else 0, row.reason)


def _num_rows(path: str, part: Part) -> int:
    """Count the rows of a part that has not been read yet."""
    if form_of(path) is Form.PARQUET:
        return part.end - part.begin
    # A line begins at 0, and after every line break except one at the end of the part.
    rows, left = (0 if part.begin else 1), part.end - max(part.begin, 1)
    with reading(path), open(path, "rb") as stream:
        stream.seek(max(part.begin - 1, 0))
        while left > 0 and (block := stream.read(min(left, _BLOCK_BYTES))):
            rows += block.count(b"\n")
            left -= len(block)
    return rows
