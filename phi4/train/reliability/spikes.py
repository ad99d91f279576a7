"""Which loss or gradient norm is a spike: far above the steps before it, by robust statistics.

Median and median absolute deviation, because one spike that got into the window must not hide the
next one. Norms are compared as logarithms, because norms change by factors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phi4.engine.step_values import StepResult, UpdateLimits
from phi4.rundir.state import Numerics

_SIGMA = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
_LEAST_NORM_FACTOR = math.log(2.0)
_LEAST_LOSS_RISE = 0.05
_LEAST_LOSS_SHARE = 0.1
"""Smaller rises are no spikes, however small the spread of the window: a norm below twice the
median; a loss that exceeds the median by less than a tenth of it, or by less than 0.05."""
_SMALLEST_NORM = 1e-30


@dataclass(frozen=True)
class SpikeDetector:
    """Depends on earlier steps only, so that a resumed run decides as if it had never stopped.

    Attributes:
        deviations: robust standard deviations above the median that are no spike; 0 finds none.
        window: good steps that a step is compared with; none is a spike before half of them.
    """

    deviations: float
    window: int

    def limits(self, past: Numerics) -> UpdateLimits:
        """Above these the next step is a spike; infinite while there are too few steps."""
        if not self.deviations or 2 * len(past.losses) < self.window:
            return UpdateLimits()
        loss, spread = _median_and_spread(past.losses)
        least_rise = max(_LEAST_LOSS_RISE, _LEAST_LOSS_SHARE * abs(loss))
        log_norm, log_spread = _median_and_spread(past.log_norms)
        log_limit = log_norm + max(_LEAST_NORM_FACTOR, self.deviations * log_spread)
        return UpdateLimits(
            loss=loss + max(least_rise, self.deviations * spread),
            grad_norm=math.exp(log_limit) if log_limit < 700.0 else math.inf,
        )

    def following(self, past: Numerics, result: StepResult) -> Numerics:
        """What the step after a step is compared with: only steps that updated count."""
        if not result.updated:
            return Numerics(past.losses, past.log_norms, past.bad_in_row + 1)
        kept = max(0, len(past.losses) + 1 - self.window)
        return Numerics(
            losses=(*past.losses[kept:], result.loss),
            log_norms=(*past.log_norms[kept:], math.log(max(result.grad_norm, _SMALLEST_NORM))),
        )


def describe(result: StepResult, limits: UpdateLimits) -> str:
    """What is wrong with a step that did not update the weights."""
    named = {
        "loss": (result.loss, limits.loss),
        "gradient norm": (result.grad_norm, limits.grad_norm),
    }
    wrong = []
    for name, (value, limit) in named.items():
        if not math.isfinite(value):
            wrong.append(f"{name} is {value}")
        elif value > limit:
            wrong.append(f"{name} {value:.4g} is a spike (above {limit:.4g})")
    return " and ".join(wrong)


def is_finite(result: StepResult) -> bool:
    """Whether loss and gradient norm are."""
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the robust standard deviation around it."""
    middle = _median(values)
    return middle, _SIGMA * _median([abs(value - middle) for value in values])


def _median(values: Sequence[float]) -> float:
    """The middle one, the upper of two."""
    return sorted(values)[len(values) // 2]
