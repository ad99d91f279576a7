"""Grades of a model's answers.

The decision: an answer that was cut off is wrong, whatever it says so far, because a model that
does not come to an end has not answered.
"""

from collections.abc import Sequence

from phi4.oracles.verdict import Grade, Graded, Oracle, ToGrade
from phi4.pts.answers import AnswerRow


def grade_answers(oracle: Oracle, rows: Sequence[AnswerRow]) -> list[Graded]:
    """The verdict on each answer, in their order."""
    finished = [row for row in rows if row.is_finished]
    verdicts = iter(oracle.grade([ToGrade(row.text, row.key) for row in finished]))
    return [next(verdicts) if row.is_finished else _CUT_OFF for row in rows]


_CUT_OFF = Graded(Grade.WRONG, "cut off")
