"""Which source the next unit comes from: a quota rule with earliest deadlines.

A source may be drawn once its deficit has reached 1 / (2K - 2) of a unit and must be drawn before
the deficit exceeds 1 - 1 / (2K - 2); among those that may, the earliest deadline goes first. That
keeps every source within one unit of its fraction at every prefix. The more obvious rule, always
the largest deficit, does not. All arithmetic is on integers, so the order is exact at any length.

Source: Tijdeman 1980, The chairman assignment problem.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as integers in the same, exact decimal ratio, without common divisor."""
    # str gives the decimal that the recipe wrote: 0.15 is 3/20 here, not its binary neighbour.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    shares = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


def quota_order(shares: Sequence[int], drawn: Sequence[int], num_units: int) -> np.ndarray:
    """Sources of the next units.

    Args:
        shares: integers in the ratio of the blend, at least one positive; a source with share 0
            is never drawn.
        drawn: units drawn from each source since this blend began.
        num_units: how many draws to compute.

    Returns:
        [num_units], int64, index of the source of each draw.
    """
    total = sum(shares)
    # 1 / spread is the deficit that makes a source eligible; a lone source is always.
    spread = max(2, 2 * sum(share > 0 for share in shares) - 2)
    counts = list(drawn)

    def eligible(source: int) -> tuple[int, int]:
        cost = spread * shares[source]
        return -(-(spread * counts[source] + 1) * total // cost), source

    def deadline(source: int) -> tuple[int, int]:
        cost = spread * shares[source]
        return (spread * (counts[source] + 1) - 1) * total // cost, source

    waiting = [eligible(source) for source, share in enumerate(shares) if share]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    order = np.empty(num_units, dtype=np.int64)
    start = sum(counts) + 1
    for step in range(num_units):
        while waiting and waiting[0][0] <= start + step:
            heapq.heappush(ready, deadline(heapq.heappop(waiting)[1]))
        source = heapq.heappop(ready)[1]
        order[step] = source
        counts[source] += 1
        heapq.heappush(waiting, eligible(source))
    return order
