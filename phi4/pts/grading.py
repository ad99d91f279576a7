"""Grade a model's answers.

A truncated answer is wrong, regardless of its content, because the model did not finish its answer.
"""

from collections.abc import Sequence

from phi4.oracles.verdict import Grade, Graded, Oracle, ToGrade
from phi4.pts.answers import AnswerRow


def grade_answers(oracle: Oracle, rows: Sequence[AnswerRow]) -> list[Graded]:
    """Return the verdict on each answer, in order."""
    finished = [row for row in rows if row.is_finished]
    verdicts = iter(oracle.grade([ToGrade(row.text, row.key) for row in finished]))
    return [next(verdicts) if row.is_finished else _CUT_OFF for row in rows]


_CUT_OFF = Graded(Grade.WRONG, "cut off")
