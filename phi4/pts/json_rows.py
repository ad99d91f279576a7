"""Read JSON Lines files that a user wrote; every error names its line."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from phi4.data.files.jsonl import parse_row, placed_lines
from phi4.errors import DataError


def read_json_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the place of each row, for errors, and its columns; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    for place, line, num_bytes in placed_lines(path):
        try:
            row = parse_row(line, num_bytes)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        yield place, row


def text_of(row: Mapping[str, object], column: str, place: str) -> str:
    """Return the text of a column.

    Raises:
        DataError: it is missing, empty or not a string.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {column} is {value!r}; expected a text")
    return value


def optional_text_of(row: Mapping[str, object], column: str, place: str) -> str | None:
    """Return the text of a column; None if it is null or missing.

    Raises:
        DataError: it is something else.
    """
    return None if row.get(column) is None else text_of(row, column, place)


def question_of(row: Mapping[str, object], place: str) -> str:
    """Return the id of a question in a column `question`.

    Raises:
        DataError: it is neither a string nor an integer.
    """
    value = row.get("question")
    if type(value) not in (str, int):
        raise DataError(f"{place}: question is {value!r}; expected a question id")
    return str(value)
