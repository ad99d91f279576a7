"""How far a share that was counted can be from the true one."""

import math

_Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; 0 to 1 without trials.

    Args:
        successes: counted.
        trials: of which.
    """
    if not trials:
        return 0.0, 1.0
    share, shrink = successes / trials, 1 + _Z_95**2 / trials
    centre = (share + _Z_95**2 / (2 * trials)) / shrink
    half = _Z_95 / shrink * math.sqrt(share * (1 - share) / trials + (_Z_95 / (2 * trials)) ** 2)
    # At 0 and at all the bounds are exact, whatever the arithmetic leaves.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high
