"""`PREFIX.rejected.jsonl`: the rows excluded from a token file, with reasons."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.input_rows import BLANK


class RejectedRow(msgspec.Struct, frozen=True):
    """A row that is not in the token file."""

    input: str
    line: int
    reason: str


def rejected_path(prefix: str | Path) -> str:
    """Return the path of the list of rejected rows of `PREFIX.bin`."""
    return f"{prefix}.rejected.jsonl"


def num_faults(rows: Iterable[RejectedRow]) -> int:
    """Count rejected rows that are bad; blank lines are not errors."""
    return sum(row.reason != BLANK for row in rows)


def write_rejected_rows(path: str | Path, rows: Sequence[RejectedRow]) -> None:
    """Write the list; with no rows, remove the file."""
    if rows:
        write_atomically(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    else:
        Path(path).unlink(missing_ok=True)


def why_nothing(prefix: str | Path, num_rows: int, rows: Iterable[RejectedRow], noun: str) -> str:
    """Return why there is nothing to write, for an error.

    Args:
        prefix: prefix of the pair that is not written.
        num_rows: number of rows that were read.
        rows: all of them, rejected.
        noun: what a row was expected to be.
    """
    common = Counter(row.reason for row in rows).most_common(1)
    if not common:
        return "the inputs contain no text; directories are searched for source, text and row files"
    reason, count = common[0]
    return (
        f"none of {num_rows} rows is a {noun}, {count} of them because: {reason}; see "
        f"{rejected_path(prefix)}"
    )
