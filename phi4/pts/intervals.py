"""Confidence intervals of proportions."""

import math

_Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion; 0 to 1 without trials.

    Args:
        successes: number of successes.
        trials: number of trials.
    """
    if not trials:
        return 0.0, 1.0
    share, shrink = successes / trials, 1 + _Z_95**2 / trials
    centre = (share + _Z_95**2 / (2 * trials)) / shrink
    half = _Z_95 / shrink * math.sqrt(share * (1 - share) / trials + (_Z_95 / (2 * trials)) ** 2)
    # With no successes or no failures the bounds are exact, despite rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high
