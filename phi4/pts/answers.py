"""Rows of a model's answers to questions.

A row also holds its question, so that all consumers of answers (grading, rejection sampling, judged
pairs, refusals) need no other file, and files of several models can be joined.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from phi4.errors import DataError


class AnswerRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sample of a model's answer to a question.

    Attributes:
        question: id of the question.
        prompt_ids: the question's prompt as the model saw it.
        prompt: the prompt as text for people; empty where only ids were given.
        key: the answer key for an oracle; None without one.
        task: task of the question.
        model: identity of the model.
        sample: index of the sample, from 0.
        seed: seed of the question's request.
        temperature: temperature of the draw.
        ids: token ids of the answer, with the stop id that ended it.
        text: text of the ids without the stop.
        finish_reason: `stop` or `length`.
    """

    question: str
    prompt_ids: list[int]
    prompt: str
    key: Any
    task: str
    model: str
    sample: int
    seed: int
    temperature: float
    ids: list[int]
    text: str
    finish_reason: str

    @property
    def is_finished(self) -> bool:
        """Whether the model ended it; a truncated answer is a failure."""
        return self.finish_reason == "stop"


def read_answers(path: Path) -> Iterator[AnswerRow]:
    """Yield the rows of a file that `phi4 answers draw` wrote.

    Raises:
        DataError: the file cannot be read, or a line is not an answer.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield parse_answer(line, f"{path}:{number}")
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file of answers that cannot be read."""
    return DataError(
        f"answers {path} cannot be read: {error.strerror}; give a file of `phi4 answers draw`"
    )


def parse_answer(line: bytes, place: str) -> AnswerRow:
    """Parse the answer of a line.

    Raises:
        DataError: it is not an answer; the message begins with the place.
    """
    try:
        return _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{place} is not an answer: {error}; draw answers with `phi4 answers draw`"
        ) from None


_DECODER = msgspec.json.Decoder(AnswerRow)
