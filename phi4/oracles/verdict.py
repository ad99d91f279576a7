"""What an oracle says of an answer.

The decision: there are three verdicts. An answer that cannot be graded, because the key is foreign,
a grader ran out of time or a sandbox did not start, is neither right nor wrong, and nobody may
count it as either.
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
        reason: why, in a line; empty where there is nothing to add to `right`.
        versions: of the programs that decided, by name, for example `python` and `bwrap`.
    """

    outcome: Grade
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ToGrade:
    """An answer to grade.

    Attributes:
        answer: text of the model.
        key: what the question's row holds under `answer`; each oracle says what it takes.
    """

    answer: str
    key: object


class Oracle(Protocol):
    """Grades answers; whatever is in an answer, `grade` raises nothing.

    Attributes:
        name: as it is asked for.
    """

    name: str

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """The verdict on each answer, in their order."""

    def close(self) -> None:
        """End its processes, if it has any."""
