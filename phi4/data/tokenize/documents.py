"""Read inputs as documents: text or conversations.

A row that is neither becomes a value with a reason; it is neither raised as an exception nor
skipped.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phi4.data.files.input_rows import BLANK, Part, read_input_rows
from phi4.data.rows.conversations import CONVERSATION, CONVERSATION_COLUMNS, read_conversation
from phi4.data.rows.forms import PREFERENCE_MARKS, holds_preference
from phi4.data.vocabulary.chat import Conversation
from phi4.errors import DataError

TEXT_COLUMN = "text"


@dataclass(frozen=True)
class Row:
    """A document, or the reason why there is none.

    Attributes:
        path: the input.
        number: line or row from 1, counted from the beginning of the part; 0 for an entire file.
        content: text or conversation, None for a bad row.
        reason: why it is bad.
    """

    path: str
    number: int
    content: str | Conversation | None
    reason: str = ""


def read_rows(part: Part, text_column: str | None = None) -> Iterator[Row]:
    """Read all rows of a part in order.

    Args:
        part: from `list_parts`.
        text_column: column of the text. None takes `text`, or a conversation under `messages` or
            `prompt` and `completion`, and rejects a row that has both; `messages` takes the
            conversation of such a row.

    Raises:
        DataError: a file cannot be read or decompressed.
    """
    columns = (text_column or TEXT_COLUMN, *CONVERSATION_COLUMNS, *PREFERENCE_MARKS)
    for row in read_input_rows(part, columns):
        if isinstance(row.content, dict):
            yield _column_row(row.path, row.number, row.content, text_column)
        elif row.content is None:
            yield Row(row.path, row.number, None, row.reason)
        else:
            yield _text_row(row.path, row.number, row.content)


def _column_row(path: str, number: int, row: dict, text_column: str | None) -> Row:
    text = row.get(text_column or TEXT_COLUMN)
    if text_column is None and text is not None and _has_conversation(row):
        return Row(
            path,
            number,
            None,
            f"holds {TEXT_COLUMN!r} and a conversation; choose with --text-field {TEXT_COLUMN} or "
            f"--text-field {CONVERSATION}",
        )
    if isinstance(text, str):
        return _text_row(path, number, text)
    if row.get(CONVERSATION) is None and "completion" not in row and holds_preference(row):
        return Row(path, number, None, "holds a preference; read the file with `phi4 data pairs`")
    if text_column == CONVERSATION or (text is None and _has_any(row, CONVERSATION_COLUMNS)):
        try:
            # A column that is null in this row exists in another row of the file.
            present = {name: value for name, value in row.items() if value is not None}
            return Row(path, number, read_conversation(present))
        except DataError as error:
            return Row(path, number, None, str(error))
    column = text_column or TEXT_COLUMN
    found = ("null" if column in row else "nothing") if text is None else type(text).__name__
    return Row(path, number, None, f"expected a string under {column!r}, got {found}")


def _has_conversation(row: dict) -> bool:
    return row.get(CONVERSATION) is not None or (
        row.get("prompt") is not None and row.get("completion") is not None
    )


def _has_any(row: dict, columns: Iterable[str]) -> bool:
    return any(row.get(name) is not None for name in columns)


def _text_row(path: str, number: int, text: str) -> Row:
    if not text or text.isspace():
        return Row(path, number, None, BLANK)
    if "\0" in text:
        return Row(path, number, None, f"NUL at character {text.index(chr(0))}")
    return Row(path, number, text)
