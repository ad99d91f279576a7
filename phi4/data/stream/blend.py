"""Choose the source of the next draw: quota rules with earliest deadlines.

Draws of equal size: a source may be drawn once its deficit has reached 1 / (2K - 2) of a draw and
must be drawn before the deficit exceeds 1 - 1 / (2K - 2); among the eligible sources, the earliest
deadline goes first. This keeps every source within one unit of its fraction at every prefix; the
more obvious rule, always the largest deficit, does not. The order repeats once every source has had
its full share, so one period determines any position in any run. Draws of unequal size, weighted by
loss tokens: worst-case fair queueing, which keeps every source within one largest sample. All
arithmetic is on integers, so both orders are exact at any length.

Source: Tijdeman 1980, The chairman assignment problem; Bennett and Zhang 1996, WF2Q.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import count

import numpy as np

_LONGEST_PERIOD = 1 << 17
"""Longest stored period, enough for weights of up to five decimals; longer ones are drawn one by
one."""

_BLOCK_DRAWS = 128
"""Number of draws whose loss tokens are looked up at once."""


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the weights as integers in the same, exact decimal ratio, without common divisor."""
    # str gives the decimal written in the recipe: 0.15 is 3/20 here, not its binary neighbour.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    shares = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


def draw_order(shares: Sequence[int], drawn: Sequence[int], num_draws: int) -> np.ndarray:
    """Return `quota_order`, looked up in the period of the blend if that is short enough."""
    total = sum(shares)
    if total > _LONGEST_PERIOD:
        return quota_order(shares, drawn, num_draws)
    start = sum(drawn) % total
    return np.take(_period(tuple(shares)), np.arange(start, start + num_draws), mode="wrap")


def drawn_after(shares: Sequence[int], drawn: Sequence[int], num_draws: int) -> list[int]:
    """Return draws from each source after `num_draws` more; constant time for short periods."""
    total = sum(shares)
    periods, rest = divmod(num_draws, total) if total <= _LONGEST_PERIOD else (0, num_draws)
    added = np.bincount(draw_order(shares, drawn, rest), minlength=len(shares)).tolist()
    return [
        count + periods * share + more
        for count, share, more in zip(drawn, shares, added, strict=True)
    ]


def quota_order(shares: Sequence[int], drawn: Sequence[int], num_draws: int) -> np.ndarray:
    """Return the sources of the next draws of equal size.

    Args:
        shares: integers in the ratio of the blend, at least one positive; a source with share 0
            is never drawn.
        drawn: draws from each source since this blend began.
        num_draws: number of draws.

    Returns:
        [num_draws], int64, index of the source of each draw.
    """
    total = sum(shares)
    # 1 / spread is the deficit that makes a source eligible; a single source is always eligible.
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
    order = np.empty(num_draws, dtype=np.int64)
    start = sum(counts) + 1
    for step in range(num_draws):
        while waiting and waiting[0][0] <= start + step:
            heapq.heappush(ready, deadline(heapq.heappop(waiting)[1]))
        source = heapq.heappop(ready)[1]
        order[step] = source
        counts[source] += 1
        heapq.heappush(waiting, eligible(source))
    return order


def loss_order(
    shares: Sequence[int],
    served: Sequence[int],
    num_draws: int,
    loss_of: Callable[[int, int, int], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources of the next draws when the blend is measured in loss tokens.

    A source may be drawn while it is not ahead of its fraction; among those, the one whose next
    sample is due first goes first. No source deviates from its fraction by a largest sample or
    more.

    Args:
        shares: as in `quota_order`.
        served: loss tokens from each source since this blend began.
        num_draws: number of draws.
        loss_of: (source, begin, end) to the loss tokens of those of its next draws, all above 0.

    Returns:
        source: [num_draws], int64.
        loss: [num_draws], int64, loss tokens of each draw.
    """
    drawable = [source for source, share in enumerate(shares) if share]
    common = math.lcm(*(shares[source] for source in drawable))
    pace = {source: common // shares[source] for source in drawable}
    served, total = list(served), sum(served)
    whole = sum(shares)
    ahead = {source: _one_by_one(loss_of, source) for source in drawable}
    upcoming = {source: next(ahead[source]) for source in drawable}
    order, loss = np.empty((2, num_draws), dtype=np.int64)
    for step in range(num_draws):
        ready = (s for s in drawable if served[s] * whole <= shares[s] * total)
        source = min(ready, key=lambda s: ((served[s] + upcoming[s]) * pace[s], s))
        order[step], loss[step] = source, upcoming[source]
        served[source] += upcoming[source]
        total += upcoming[source]
        upcoming[source] = next(ahead[source])
    return order, loss


def _one_by_one(loss_of: Callable[[int, int, int], np.ndarray], source: int) -> Iterator[int]:
    """Yield the loss tokens of a source's draws, looked up in blocks."""
    for begin in count(0, _BLOCK_DRAWS):
        yield from loss_of(source, begin, begin + _BLOCK_DRAWS).tolist()


@lru_cache(maxsize=4)
def _period(shares: tuple[int, ...]) -> np.ndarray:
    return quota_order(shares, [0] * len(shares), sum(shares))
