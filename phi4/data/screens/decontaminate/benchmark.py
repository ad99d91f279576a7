"""Read benchmark items from local files of rows with any column names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phi4.data.screens.quality.inputs import list_inputs
from phi4.data.screens.quality.rows import parse, read_lines
from phi4.errors import DataError

_LABELS = frozenset(
    {"id", "_id", "idx", "task_id", "question_id", "uid", "source", "source_id", "url", "split"}
    | {"subject", "category", "level", "type", "label", "answer_key", "answerkey", "answer_idx"}
)
"""Columns that identify an item and are not part of its text."""


@dataclass(frozen=True)
class Item:
    """One benchmark item.

    Attributes:
        benchmark: the file's name without its suffix, see `list_inputs`.
        number: line number, from 1.
        text: all strings of the row, one per line.
    """

    benchmark: str
    number: int
    text: str


def read_benchmarks(paths: Iterable[Path]) -> list[Item]:
    """Read items; the text of a row is every string in it except identifiers and labels.

    Raises:
        DataError: a file cannot be read, a line is not a JSON object or has no text, two files have
            the same name, or a file is empty.
    """
    items: list[Item] = []
    for file in list_inputs(paths):
        start = len(items)
        for line in read_lines([file.path]):
            try:
                strings = [text for text in _strings(parse(line)) if text.strip()]
            except DataError as error:
                raise DataError(
                    f"{file.path}, line {line.number}: {error}; repair the file"
                ) from None
            if not strings:
                raise DataError(f"{file.path}, line {line.number}: no text; remove the line")
            items.append(Item(file.name, line.number, "\n".join(strings)))
        if len(items) == start:
            raise DataError(f"{file.path} has no items; remove it or give the right file")
    return items


def _strings(value: object, name: str = "") -> Iterator[str]:
    if isinstance(value, str):
        if name.lower() not in _LABELS:
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, name)
