"""Select the comparisons of a prompt's answers: of any model with any other.

Source: report, section 4.3: all combinations of the models' replies.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from phi4.pts.answers import AnswerRow
from phi4.pts.judged.recipe import PairsSection


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt."""

    left: AnswerRow
    right: AnswerRow


def comparisons_of(
    rows: Sequence[AnswerRow], pairs: PairsSection, counts: Counter[str]
) -> list[AnswerPair]:
    """Return the comparisons of one prompt's answers.

    Args:
        rows: all answers to the prompt.
        pairs: settings of the comparisons.
        counts: number of dropped items by reason: `empty` answers, and `identical`, `not_drawn`
            comparisons.
    """
    given = [row for row in rows if row.ids]
    counts["empty"] += len(rows) - len(given)
    found: list[AnswerPair] = []
    for left, right in combinations(given, 2):
        if left.model == right.model and not pairs.same_model:
            continue
        if left.ids == right.ids or left.text == right.text:
            counts["identical"] += 1
            continue
        found.append(AnswerPair(left, right))
    if not pairs.max_per_prompt or len(found) <= pairs.max_per_prompt:
        return found
    counts["not_drawn"] += len(found) - pairs.max_per_prompt
    order = sorted(range(len(found)), key=lambda index: _draw(found[index], pairs.seed))
    return [found[index] for index in sorted(order[: pairs.max_per_prompt])]


def _draw(comparison: AnswerPair, seed: int) -> bytes:
    """Return a pseudo-random order of comparisons, independent of the order of the files."""
    sides = sorted((row.model, row.sample) for row in (comparison.left, comparison.right))
    return hashlib.sha256(repr((seed, comparison.left.question, sides)).encode()).digest()
