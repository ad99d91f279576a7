"""A table of the page, as texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

MAX_ROWS = 500
"""Maximum number of rows of a table; the newest are shown."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: id of its element within the run; of letters and `-`.
        title: title above it.
        head: names of the columns.
        rows: cells as texts.
        notes: lines below it.
        numeric: numeric columns, which are right-aligned.
        foot: a last row with totals; empty without one.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    numeric: Sequence[int] = ()
    foot: Sequence[str] = field(default=())

    def newest(self) -> "Table":
        """Return the table cut to the newest rows."""
        if len(self.rows) <= MAX_ROWS:
            return self
        note = f"The newest {MAX_ROWS:,} of {len(self.rows):,} rows."
        return replace(self, rows=self.rows[-MAX_ROWS:], notes=(*self.notes, note))


def step_range(first: int, last: int) -> str:
    """Format steps from the first to the last one."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
