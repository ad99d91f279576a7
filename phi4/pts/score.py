"""Score answers: accuracy over questions with its confidence interval.

A question is one observation, however many samples it has. Samples of a question are correlated, so
an interval over samples would be too narrow; two models are compared question by question, which
removes the variance between questions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from phi4.errors import DataError
from phi4.oracles.verdict import Grade, Oracle
from phi4.pts.answers import AnswerRow
from phi4.pts.grading import grade_answers


@dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    Attributes:
        mean: mean of the questions' values.
        standard_error: standard error of the mean; None with fewer than two questions.
        num_questions: number of questions.
    """

    mean: float
    standard_error: float | None
    num_questions: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        return f"{self.mean:.3f}{error}"


@dataclass(frozen=True)
class Score:
    """The grades of a file of answers.

    Attributes:
        shares: question to the fraction of right answers among its gradable ones.
        num_answers: number of all answers.
        num_truncated: answers that the model did not end; they are wrong.
        num_ungradable: answers that are neither right nor wrong.
        num_ungraded_questions: questions without a gradable answer, which have no share.
    """

    shares: Mapping[str, float]
    num_answers: int
    num_truncated: int
    num_ungradable: int
    num_ungraded_questions: int

    @property
    def accuracy(self) -> Estimate:
        """Return the mean fraction of right answers.

        Raises:
            DataError: no question could be graded.
        """
        return _estimate(list(self.shares.values()))


def score_answers(rows: Iterable[AnswerRow], oracle: Oracle) -> Score:
    """Grade answers.

    Args:
        rows: rows of one model.
        oracle: oracle for their keys.

    Raises:
        DataError: there is no answer.
    """
    rows = list(rows)
    if not rows:
        raise DataError("there is no answer to score; draw some with `phi4 answers draw`")
    shares: dict[str, list[float]] = {}
    num_ungradable = 0
    for row, graded in zip(rows, grade_answers(oracle, rows), strict=True):
        of_question = shares.setdefault(row.question, [])
        if graded.outcome is Grade.UNGRADABLE:
            num_ungradable += 1
        else:
            of_question.append(float(graded.outcome is Grade.RIGHT))
    return Score(
        shares={name: math.fsum(one) / len(one) for name, one in shares.items() if one},
        num_answers=len(rows),
        num_truncated=sum(not row.is_finished for row in rows),
        num_ungradable=num_ungradable,
        num_ungraded_questions=sum(not one for one in shares.values()),
    )


def gain(before: Score, after: Score) -> Estimate:
    """Return how much more often the answers of one file are right than those of another.

    Raises:
        DataError: the files answer different questions.
    """
    if before.shares.keys() != after.shares.keys():
        common = len(before.shares.keys() & after.shares.keys())
        raise DataError(
            f"the files answer different questions: {len(before.shares)} and {len(after.shares)}, "
            f"{common} of them in both; draw both from one --questions file, with or without "
            "--chat for both, or give the rows an `id`"
        )
    return _estimate([after.shares[name] - share for name, share in before.shares.items()])


def _estimate(values: Sequence[float]) -> Estimate:
    if not values:
        raise DataError("no answer could be graded; check that the oracle supports these keys")
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)
