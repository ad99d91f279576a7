"""The remaining time of a run, estimated from the wall time of its recent steps."""

import time
from collections import deque
from collections.abc import Callable

from phi4.config import Recipe

_FEWEST_STEPS, _MOST_STEPS = 100, 2000


class TimeLeft:
    """Seconds to the end of the run: the steps to come times the mean time of recent ones.

    A step's time runs from one record to the next, so that it includes evaluations, saves and
    everything else between steps. The longest time is replaced by the second longest: a single
    stall, or the only save since a restart, does not predict later steps; a recurring event does.

    Args:
        recipe: how many steps are between evaluations and saves: the mean is over two of those.
        clock: seconds.
    """

    def __init__(self, recipe: Recipe, clock: Callable[[], float] = time.monotonic) -> None:
        period = max(recipe.evaluation.every, recipe.checkpoint.every)
        window = min(max(2 * period, _FEWEST_STEPS), _MOST_STEPS)
        self._seconds: deque[float] = deque(maxlen=window)
        self._clock = clock
        self._since = clock()

    def begin(self) -> None:
        """Count the next step's time from here."""
        self._since = self._clock()

    def after_step(self, steps_left: int) -> float:
        """Add a step that ended now; returns the estimated seconds to the end of the run.

        Args:
            steps_left: steps of the run after this one.
        """
        now = self._clock()
        self._seconds.append(now - self._since)
        self._since = now
        return steps_left * self._mean() if steps_left else 0.0

    def _mean(self) -> float:
        *rest, longest = sorted(self._seconds)
        return (sum(rest) + min(longest, rest[-1] if rest else longest)) / len(self._seconds)
