"""The verdict of an oracle on an answer.

There are three verdicts. An answer that cannot be graded, because the key has an unknown format, a
grader timed out or a sandbox did not start, is neither right nor wrong, and must not be counted as
either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Grade(StrEnum):
    """Right, wrong, or neither."""

    RIGHT = "right"
    WRONG = "wrong"
    UNGRADABLE = "ungradable"


@dataclass(frozen=True)
class Graded:
    """One answer's grade.

    Attributes:
        outcome: the grade.
        reason: why, in a line; may be empty for `right`.
        versions: versions of the deciding programs, by name, for example `python` and `bwrap`.
    """

    outcome: Grade
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ToGrade:
    """An answer to grade.

    Attributes:
        answer: text of the model.
        key: the `answer` of the question's row; each oracle defines its format.
    """

    answer: str
    key: object


class Oracle(Protocol):
    """Grades answers; `grade` never raises, whatever an answer contains.

    Attributes:
        name: name given by the user.
    """

    name: str

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """Return the verdict on each answer, in order."""

    def close(self) -> None:
        """End its processes, if it has any."""
