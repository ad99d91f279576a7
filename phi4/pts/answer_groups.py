"""Group the answers of one or more files by question.

Memory holds the positions of the answers, not the answers, so files of any length, in any order,
can be read by question. The files must not change meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from phi4.errors import DataError
from phi4.pts.answers import AnswerRow, parse_answer, unreadable


@dataclass(frozen=True)
class _Place:
    """Where a line begins."""

    file: int
    number: int
    offset: int


class AnswerGroups:
    """Answers by question, in the order in which questions first appear.

    Args:
        paths: files that `phi4 answers draw` wrote.

    Raises:
        DataError: a file cannot be read, or a line is not an answer.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._places: dict[str, list[_Place]] = {}
        for index, path in enumerate(self._paths):
            for place, question in _index(path, index):
                self._places.setdefault(question, []).append(place)
        if not self._places:
            raise DataError(
                f"there is no answer in {', '.join(map(str, paths))}; draw some with "
                f"`phi4 answers draw`"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[list[AnswerRow]]:
        """Yield the answers to a question, at least one, in the order of the files.

        Raises:
            DataError: a model has two answers of one sample index to a question, or the question
                has prompts that differ.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(_opened(path)) for path in self._paths]
            for places in self._places.values():
                rows = [self._read(files, place) for place in places]
                _check(rows, [f"{self._paths[p.file]}:{p.number}" for p in places])
                yield rows

    def _read(self, files: Sequence[BinaryIO], place: _Place) -> AnswerRow:
        stream = files[place.file]
        stream.seek(place.offset)
        return parse_answer(stream.readline(), f"{self._paths[place.file]}:{place.number}")


def _index(path: Path, index: int) -> Iterator[tuple[_Place, str]]:
    offset = 0
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            yield _Place(index, number, offset), parse_answer(line, f"{path}:{number}").question
            offset += len(line)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def _check(rows: Sequence[AnswerRow], places: Sequence[str]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for row, place in zip(rows, places, strict=True):
        draw = (row.model, row.sample)
        if draw in seen:
            raise DataError(
                f"{place}: sample {row.sample} of {row.model} to question {row.question!r} is also "
                f"at {seen[draw]}; give each file once"
            )
        seen[draw] = place
        if row.prompt_ids != rows[0].prompt_ids:
            raise DataError(
                f"{place}: question {row.question!r} has a different prompt at {places[0]}, so the "
                f"answers cannot be compared; draw all with the same prompts and tokenizer"
            )
