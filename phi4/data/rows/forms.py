"""Determine the form of a preference row from its columns, which must be unambiguous."""

from collections.abc import Mapping

from phi4.data.rows.messages import column_names
from phi4.data.rows.preferences import PREFERENCE_COLUMNS, PreferencePair, read_preference
from phi4.data.rows.token_ids import (
    PAIR_ID_COLUMNS,
    PIVOT_COLUMNS,
    PairIds,
    Pivots,
    read_pair_ids,
    read_pivots,
)
from phi4.errors import DataError

PREFERENCE_FORM_COLUMNS = (*PREFERENCE_COLUMNS, *PAIR_ID_COLUMNS, *PIVOT_COLUMNS, "tools")
"""All columns used by readers of preferences."""
PREFERENCE_MARKS = ("chosen", "completions", "chosen_ids", "chosen_id", "pivots")
"""Columns of which a preference row has exactly one."""


def read_preference_row(
    row: Mapping[str, object], vocab_size: int
) -> PreferencePair | PairIds | Pivots:
    """Parse the preference of a row in any form; a column that is null counts as missing.

    Args:
        row: columns by name; unknown columns are ignored.
        vocab_size: ids must be below this.

    Raises:
        DataError: the row has no form or two of them, or as the form's reader.
    """
    row = {name: value for name, value in row.items() if value is not None}
    marks = [name for name in PREFERENCE_MARKS if name in row]
    if not marks:
        raise DataError(
            f"row has no preference: its columns are {column_names(row)}; expected "
            f"{', '.join(PREFERENCE_MARKS[:-1])} or {PREFERENCE_MARKS[-1]}"
        )
    if len(marks) > 1:
        raise DataError(f"row has two preferences, under {' and '.join(marks)}; remove one")
    match marks[0]:
        case "chosen" | "completions":
            return read_preference(row)
        case "chosen_ids":
            return read_pair_ids(row, vocab_size)
        case _:
            return read_pivots(row, vocab_size)


def holds_preference(row: Mapping[str, object]) -> bool:
    """Return whether a row has a column of a preference."""
    return any(row.get(name) is not None for name in PREFERENCE_MARKS)
