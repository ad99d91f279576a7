"""Assess pairs of answers: by a judge that sees both orders, or by an oracle with the key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from phi4.data.vocabulary.chat import Message
from phi4.oracles.verdict import Grade, Graded, Oracle
from phi4.pts.answers import AnswerRow
from phi4.pts.grading import grade_answers
from phi4.pts.judged.comparisons import AnswerPair
from phi4.sampling.judge import Heard, Judge, Refused, hear
from phi4.sampling.judge_prompt import Showing
from phi4.sampling.judge_reply import Ratings


@dataclass(frozen=True)
class RefusedReply:
    """A judge's reply that is not a valid opinion.

    Attributes:
        left_first: whether the left answer was shown first.
        attempt: index of the attempt.
        refused: the reply, and why.
    """

    left_first: bool
    attempt: int
    refused: Refused


@dataclass(frozen=True)
class Assessed:
    """Assessment of a comparison.

    Attributes:
        comparison: the two answers.
        ratings: of the left and of the right answer, once per order; empty if there is no verdict.
        refused: invalid replies, even if a later attempt was valid.
        ungradable: why an oracle has no verdict; empty otherwise.
    """

    comparison: AnswerPair
    ratings: tuple[tuple[Ratings, Ratings], ...]
    refused: tuple[RefusedReply, ...] = ()
    ungradable: str = ""


class Assessor(Protocol):
    """Compares answers.

    Attributes:
        identity: part of every row.
        sees_orders: whether it is asked in both orders, so that it can contradict itself.
    """

    identity: str
    sees_orders: bool

    def assess(self, comparisons: Sequence[AnswerPair]) -> list[Assessed]:
        """Return the assessment of each comparison, in order."""


class BothOrders:
    """A judge that sees each comparison in both orders; see `Assessor`.

    Args:
        judge: the judge.
        retries: further attempts after an invalid reply.
        conversation_of: returns the turns before an answer.
    """

    sees_orders = True

    def __init__(
        self,
        judge: Judge,
        retries: int,
        conversation_of: Callable[[AnswerRow], tuple[Message, ...]],
    ) -> None:
        self.identity = judge.identity
        self._judge = judge
        self._retries = retries
        self._conversation_of = conversation_of

    def assess(self, comparisons: Sequence[AnswerPair]) -> list[Assessed]:
        """See `Assessor.assess`."""
        showings: list[Showing] = []
        for comparison in comparisons:
            turns = self._conversation_of(comparison.left)
            texts = (comparison.left.text, comparison.right.text)
            showings += [Showing(turns, *texts), Showing(turns, *reversed(texts))]
        heard = hear(self._judge, showings, self._retries)
        orders = zip(comparisons, heard[::2], heard[1::2], strict=True)
        return [_assessed(comparison, once, again) for comparison, once, again in orders]


def _assessed(comparison: AnswerPair, once: Heard, again: Heard) -> Assessed:
    refused = tuple(
        RefusedReply(left_first, attempt, reply)
        for left_first, heard in ((True, once), (False, again))
        for attempt, reply in enumerate(heard.refused)
    )
    if once.opinion is None or again.opinion is None:
        return Assessed(comparison, (), refused)
    first, second = once.opinion.scores, again.opinion.scores
    ratings = ((first.first, first.second), (second.second, second.first))
    return Assessed(comparison, ratings, refused)


class ByOracle:
    """An oracle as an assessor; see `Assessor`. Right answers get accuracy 5, wrong ones 1.

    Style and detail are equal for all answers, so both sets are determined by accuracy.
    """

    sees_orders = False

    def __init__(self, oracle: Oracle) -> None:
        self.identity = f"oracle:{oracle.name}"
        self._oracle = oracle

    def assess(self, comparisons: Sequence[AnswerPair]) -> list[Assessed]:
        """See `Assessor.assess`."""
        rows = {id(row): row for c in comparisons for row in (c.left, c.right)}
        graded = dict(zip(rows, grade_answers(self._oracle, list(rows.values())), strict=True))
        return [self._one(one, graded[id(one.left)], graded[id(one.right)]) for one in comparisons]

    def _one(self, comparison: AnswerPair, left: Graded, right: Graded) -> Assessed:
        for graded in (left, right):
            if graded.outcome is Grade.UNGRADABLE:
                return Assessed(comparison, (), ungradable=graded.reason or "ungradable")
        return Assessed(comparison, ((_rated(left), _rated(right)),))


def _rated(graded: Graded) -> Ratings:
    accuracy = 5 if graded.outcome is Grade.RIGHT else 1
    return Ratings(accuracy=accuracy, style=3, detail=3)
