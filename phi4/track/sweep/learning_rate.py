"""Estimate the best learning rate of every token budget, and extrapolate to a longer one.

Loss against log(learning rate) is approximately a parabola near its minimum. Its lowest point gets
Fieller's interval, which is valid at any curvature and is unbounded if the runs do not determine
it; over the budgets the optimum is assumed to be a power law.

An optimum that the grid does not enclose is reported as such and not estimated.

Source: technical report, section 3: the peak rate is interpolated from runs on shorter horizons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phi4.track.sweep.results import Result
from phi4.track.sweep.table import t_quantile

_NEIGHBOURS = 2
"""Number of rates on each side of the best one that the parabola is fitted to."""


@dataclass(frozen=True)
class OptimumFit:
    """The best learning rate of one scale.

    Attributes:
        rates, means: the grid and its mean losses, NaN where a run diverged.
        problem: why there is no optimum; empty if there is one.
        optimum: learning rate of the lowest point of the parabola.
        low, high: its 95% interval; NaN if degrees of freedom are missing.
        loss: at the optimum.
        curvature: second derivative of the loss by log(rate), halved.
        log_error: standard error of log(optimum).
        freedom: degrees of freedom of the interval.
        window: lowest and highest rate of the fit.
    """

    scale: str
    tokens: int
    rates: tuple[float, ...]
    means: tuple[float, ...]
    problem: str = ""
    optimum: float = math.nan
    low: float = math.nan
    high: float = math.nan
    loss: float = math.nan
    curvature: float = math.nan
    log_error: float = math.nan
    freedom: int = 0
    window: tuple[float, float] = (math.nan, math.nan)

    @property
    def is_bounded(self) -> bool:
        """Whether the optimum's interval is bounded on both sides."""
        return self.low > 0 and math.isfinite(self.high)


@dataclass(frozen=True)
class PowerLaw:
    """optimum = factor * tokens ** exponent.

    Attributes:
        problem: why there is none; empty if there is one.
        covariance: covariance of (log factor, exponent).
        num_budgets: number of budgets that it is fitted to; with two the form cannot be checked.
        freedom: degrees of freedom of its intervals.
    """

    problem: str = ""
    factor: float = math.nan
    exponent: float = math.nan
    exponent_low: float = math.nan
    exponent_high: float = math.nan
    covariance: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))
    num_budgets: int = 0
    freedom: float = math.nan

    def at(self, tokens: float) -> tuple[float, float, float]:
        """Return the optimum at a token budget, with its 95% interval."""
        place = np.array([1.0, math.log(tokens)])
        centre = math.log(self.factor) + self.exponent * place[1]
        half = t_quantile(self.freedom) * math.sqrt(place @ np.array(self.covariance) @ place)
        return _exp(centre), _exp(centre - half), _exp(centre + half)


def fit_scale(results: Sequence[Result], scale: str, axis: str, metric: str) -> OptimumFit:
    """Estimate the optimum of one scale.

    Args:
        results: results of the sweep; other scales are ignored.
        scale: its name.
        axis: axis whose values are learning rates.
        metric: lower is better. NaN means that a run diverged.
    """
    own = [result for result in results if result.scale == scale]
    losses: dict[float, dict[int, float]] = {}
    for result in own:
        losses.setdefault(float(result.values[axis]), {})[result.seed] = result.metrics[metric]
    return fit_optimum(losses, scale=scale, tokens=own[0].tokens)


def fit_optimum(
    losses: Mapping[float, Mapping[int, float]], *, scale: str, tokens: int
) -> OptimumFit:
    """Find the lowest point of a parabola through the losses around the lowest mean.

    Args:
        losses: by learning rate, then by seed; NaN where the run diverged.
        scale: name of the scale.
        tokens: its budget.
    """
    rates = tuple(sorted(losses))
    # A seed with an unfinished run would bias the order of the others.
    seeds = sorted(set.intersection(*(set(losses[rate]) for rate in rates)))
    table = np.array([[losses[rate][seed] for seed in seeds] for rate in rates])
    means = table.mean(axis=1) if seeds else np.full(len(rates), math.nan)
    shown = OptimumFit(scale, tokens, rates, tuple(map(float, means)))
    problem = _not_enclosed(rates, means)
    if problem:
        return _with_problem(shown, problem)
    best = int(np.nanargmin(means))
    window = _window(means, best)
    return _fitted(shown, np.log(rates)[window], table[window])


def fit_power_law(fits: Sequence[OptimumFit]) -> PowerLaw:
    """Fit a line through log(optimum) over log(tokens), weighted by uncertainty.

    An optimum with an unbounded interval is excluded, because its standard error understates it.
    """
    usable = [fit for fit in fits if fit.is_bounded and fit.log_error > 0]
    budgets = {fit.tokens for fit in usable}
    if len(budgets) < 2:
        return PowerLaw(
            f"{len(budgets)} token budget{'s' if len(budgets) != 1 else ''} with an optimum and a "
            "bounded interval; a power law needs two"
        )
    design = np.array([[1.0, math.log(fit.tokens)] for fit in usable])
    logs = np.log([fit.optimum for fit in usable])
    weights = 1 / np.array([fit.log_error for fit in usable]) ** 2
    # The weights differ by orders of magnitude, the columns hardly: centre before inverting.
    centre = float((weights * design[:, 1]).sum() / weights.sum())
    moved = design - [0.0, centre]
    covariance = np.linalg.inv(moved.T @ (weights[:, None] * moved))
    intercept, exponent = covariance @ moved.T @ (weights * logs)
    residuals = logs - moved @ [intercept, exponent]
    extra = len(usable) - 2
    if extra:
        # Budgets that scatter more than their errors predict increase all errors; none is
        # decreased.
        covariance = covariance * max(1.0, float((weights * residuals**2).sum()) / extra)
    back = np.array([[1.0, -centre], [0.0, 1.0]])
    covariance = back @ covariance @ back.T
    (first, across), (_, last) = covariance.tolist()
    freedom = _pooled_freedom(usable)
    half = t_quantile(freedom) * math.sqrt(covariance[1, 1])
    return PowerLaw(
        factor=math.exp(intercept - exponent * centre),
        exponent=float(exponent),
        exponent_low=float(exponent - half),
        exponent_high=float(exponent + half),
        covariance=((first, across), (across, last)),
        num_budgets=len(budgets),
        freedom=freedom,
    )


def _pooled_freedom(fits: Sequence[OptimumFit]) -> float:
    """Degrees of freedom by Welch and Satterthwaite, of the sum of the fits' variances."""
    variances = np.array([fit.log_error**2 for fit in fits])
    freedoms = np.array([fit.freedom for fit in fits])
    return float(variances.sum() ** 2 / (variances**2 / freedoms).sum())


def _not_enclosed(rates: Sequence[float], means: np.ndarray) -> str:
    """Return why the grid does not enclose a minimum; empty if it does."""
    finite = np.flatnonzero(~np.isnan(means))
    if len(finite) < 3:
        return f"{len(finite)} learning rates have finite losses for all seeds; a parabola needs 3"
    best = int(np.nanargmin(means))
    if best == 0:
        return f"the loss is lowest at {rates[0]:g}, the smallest of the grid; add smaller ones"
    if best == len(rates) - 1:
        return f"the loss is lowest at {rates[-1]:g}, the largest of the grid; add larger ones"
    for side in (best - 1, best + 1):
        if math.isnan(means[side]):
            low, high = sorted((rates[best], rates[side]))
            return (
                f"the loss is lowest at {rates[best]:g}, and runs with {rates[side]:g} diverged; "
                f"add learning rates between {low:g} and {high:g}"
            )
    return ""


def _window(means: np.ndarray, best: int) -> slice:
    """Return the rates around the best one, up to one that diverged."""
    start, stop = best, best + 1
    while start > 0 and best - start < _NEIGHBOURS and not math.isnan(means[start - 1]):
        start -= 1
    while stop < len(means) and stop - best <= _NEIGHBOURS and not math.isnan(means[stop]):
        stop += 1
    return slice(start, stop)


def _fitted(shown: OptimumFit, logs: np.ndarray, table: np.ndarray) -> OptimumFit:
    """Fit by least squares with a separate offset for every seed.

    Args:
        shown: the fields already known.
        logs: [n] log of the learning rates.
        table: [n, seeds] losses.
    """
    num_rates, num_seeds = table.shape
    origin = float(logs.mean())
    x = logs - origin
    columns = np.stack([x, x**2], axis=1)
    centred = columns - columns.mean(axis=0)
    inverse = np.linalg.inv(num_seeds * centred.T @ centred)
    slope, curvature = inverse @ centred.T @ table.sum(axis=1)
    if curvature <= 0:
        return _with_problem(shown, "the losses around the lowest one do not curve upward")
    place = -slope / (2 * curvature)
    if not x[0] <= place <= x[-1]:
        rates = f"{math.exp(logs[0]):g} to {math.exp(logs[-1]):g}"
        return _with_problem(shown, f"the parabola's lowest point is outside {rates}")
    residuals = (table - table.mean(axis=0)) - (centred @ [slope, curvature])[:, None]
    freedom = num_rates * num_seeds - num_seeds - 2
    level = float(table.mean() - columns.mean(axis=0) @ [slope, curvature])
    low = high = error = math.nan
    if freedom > 0:
        covariance = inverse * float((residuals**2).sum()) / freedom
        gradient = np.array([1.0, 2 * place])
        error = math.sqrt(gradient @ covariance @ gradient) / (2 * curvature)
        low, high = _fieller(slope, curvature, covariance, t_quantile(freedom))
    fields = {
        **vars(shown),
        "optimum": math.exp(origin + place),
        "low": _exp(origin + low),
        "high": _exp(origin + high),
        "loss": level + slope * place + curvature * place**2,
        "curvature": float(curvature),
        "log_error": error,
        "freedom": freedom,
        "window": (math.exp(logs[0]), math.exp(logs[-1])),
    }
    return OptimumFit(**fields)


def _fieller(
    slope: float, curvature: float, covariance: np.ndarray, quantile: float
) -> tuple[float, float]:
    """Return where the derivative slope + 2 curvature x is not significantly different from 0.

    Unbounded on both sides if the curvature itself is not significantly positive.
    """
    scale = quantile**2
    a = 4 * (curvature**2 - scale * covariance[1, 1])
    b = 4 * (slope * curvature - scale * covariance[0, 1])
    c = slope**2 - scale * covariance[0, 0]
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def _exp(x: float) -> float:
    """Return infinity on overflow: an interval may be very wide."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _with_problem(fit: OptimumFit, problem: str) -> OptimumFit:
    return OptimumFit(**{**vars(fit), "problem": problem})
