"""A table of the page, as texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

MAX_ROWS = 500
"""Of a table; the newest are shown."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: of its element within the run; of letters and `-`.
        title: above it.
        head: names of the columns.
        rows: texts.
        notes: lines below it.
        numeric: columns with numbers, which stand right.
        foot: a last row that sums up; empty without one.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    numeric: Sequence[int] = ()
    foot: Sequence[str] = field(default=())

    def newest(self) -> "Table":
        """Cut to the last rows that a page should hold."""
        if len(self.rows) <= MAX_ROWS:
            return self
        note = f"The newest {MAX_ROWS:,} of {len(self.rows):,} rows."
        return replace(self, rows=self.rows[-MAX_ROWS:], notes=(*self.notes, note))


def step_range(first: int, last: int) -> str:
    """Steps from the first to the last one."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
