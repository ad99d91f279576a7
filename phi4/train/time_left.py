"""How long a run still takes, from all of the wall time that its last steps took."""

import time
from collections import deque
from collections.abc import Callable

from phi4.config import Recipe

_FEWEST_STEPS, _MOST_STEPS = 100, 2000


class TimeLeft:
    """Seconds to the end of the run: the steps to come times the mean time of recent ones.

    A step's time goes from its record to the next one, so that evaluations, saves and whatever else
    lies between steps is in it. The longest counts as the second longest only: one stall, or the
    one save since a restart, says nothing of the steps to come; what happens again does.

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
        """Take note of a step that ended now, and estimate the rest.

        Args:
            steps_left: of the run.
        """
        now = self._clock()
        self._seconds.append(now - self._since)
        self._since = now
        return steps_left * self._mean() if steps_left else 0.0

    def _mean(self) -> float:
        *rest, longest = sorted(self._seconds)
        return (sum(rest) + min(longest, rest[-1] if rest else longest)) / len(self._seconds)
