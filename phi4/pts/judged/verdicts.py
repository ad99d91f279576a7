"""Combine the ratings of both orders of a comparison to a verdict, for each set of pairs.

Orders with different winners cancel each other: the judge then followed the position and not the
answer, so no margin makes a pair of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Literal

from phi4.pts.judged.recipe import PairsSection
from phi4.sampling.judge_reply import Ratings

# Means of three integers are multiples of a third, which are not exact in binary.
_ROUNDING = 1e-9


class PairSet(StrEnum):
    """A set of pairs: by the mean of all three scores, or by accuracy alone."""

    OVERALL = "overall"
    ACCURACY = "accuracy"

    def score(self, ratings: Ratings) -> float:
        """Return the score that the set compares."""
        return ratings.overall if self is PairSet.OVERALL else float(ratings.accuracy)

    def margin(self, pairs: PairsSection) -> float:
        """Return the minimum difference of a pair."""
        return pairs.overall_margin if self is PairSet.OVERALL else pairs.accuracy_margin


@dataclass(frozen=True)
class SetVerdict:
    """Verdict of a set on a comparison.

    Attributes:
        outcome: a pair, or why there is none: the orders have different winners, or the difference
            is less than the margin.
        difference: score of the left answer minus that of the right one, mean over the orders.
    """

    outcome: Literal["pair", "flipped", "tied"]
    difference: float

    @property
    def left_wins(self) -> bool:
        """For a pair: whether the left answer is the chosen one."""
        return self.difference > 0


def decide(
    ratings: Sequence[tuple[Ratings, Ratings]], pair_set: PairSet, pairs: PairsSection
) -> SetVerdict:
    """Return the verdict of a set.

    Args:
        ratings: ratings of the left and of the right answer, once per order; at least one.
        pair_set: which score is compared.
        pairs: the margins, and how orders are combined.
    """
    differences = [pair_set.score(left) - pair_set.score(right) for left, right in ratings]
    mean = fmean(differences)
    if min(differences) < -_ROUNDING and max(differences) > _ROUNDING:
        return SetVerdict("flipped", mean)
    sizes = [abs(mean)] if pairs.combine == "mean" else [abs(each) for each in differences]
    reaches = min(sizes) >= pair_set.margin(pairs) - _ROUNDING
    return SetVerdict("pair" if reaches else "tied", mean)
