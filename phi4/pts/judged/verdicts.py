"""What two orders of ratings make of a comparison, for each set of pairs.

The decision: orders that name different winners cancel each other. The judge then went by the place
and not by the answer, so no margin makes a pair of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Literal

from phi4.pts.judged.recipe import PairsSection
from phi4.sampling.judge_reply import Ratings

# Means of three whole numbers differ by thirds, which are no binary fractions.
_ROUNDING = 1e-9


class PairSet(StrEnum):
    """A set of pairs: by the mean of all three scores, or by accuracy alone."""

    OVERALL = "overall"
    ACCURACY = "accuracy"

    def score(self, ratings: Ratings) -> float:
        """What the set compares."""
        return ratings.overall if self is PairSet.OVERALL else float(ratings.accuracy)

    def margin(self, pairs: PairsSection) -> float:
        """Least difference that makes a pair."""
        return pairs.overall_margin if self is PairSet.OVERALL else pairs.accuracy_margin


@dataclass(frozen=True)
class SetVerdict:
    """What a set makes of a comparison.

    Attributes:
        outcome: a pair, or why none: the orders name different winners, or the difference is less
            than the margin.
        difference: score of the left answer minus that of the right one, mean over the orders.
    """

    outcome: Literal["pair", "flipped", "tied"]
    difference: float

    @property
    def left_wins(self) -> bool:
        """Of a pair: whether the left answer is the chosen one."""
        return self.difference > 0


def decide(
    ratings: Sequence[tuple[Ratings, Ratings]], pair_set: PairSet, pairs: PairsSection
) -> SetVerdict:
    """The verdict of a set.

    Args:
        ratings: of the left and of the right answer, once per order; at least one.
        pair_set: what is compared.
        pairs: the margins, and how orders are combined.
    """
    differences = [pair_set.score(left) - pair_set.score(right) for left, right in ratings]
    mean = fmean(differences)
    if min(differences) < -_ROUNDING and max(differences) > _ROUNDING:
        return SetVerdict("flipped", mean)
    sizes = [abs(mean)] if pairs.combine == "mean" else [abs(each) for each in differences]
    reaches = min(sizes) >= pair_set.margin(pairs) - _ROUNDING
    return SetVerdict("pair" if reaches else "tied", mean)
