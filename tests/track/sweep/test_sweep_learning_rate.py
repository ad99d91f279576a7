"""The fit of the learning rate recovers planted optima as often as its intervals say."""

import math
from pathlib import Path

import numpy as np
import pytest

from phi4.errors import DataError
from phi4.track.sweep.learning_rate import OptimumFit, fit_optimum, fit_power_law
from phi4.track.sweep.results import LOSS_RISE, SPIKES, metrics_of

GRID = tuple(float(rate) for rate in np.geomspace(1e-3, 3.2e-2, 6))
CURVATURE = 0.05
DRAWS = 400

Losses = dict[float, dict[int, float]]


def planted(
    draw: np.random.Generator,
    optimum: float,
    noise: float,
    grid: tuple[float, ...] = GRID,
    num_seeds: int = 3,
) -> Losses:
    """A parabola, a level of each seed, and noise of each run."""
    levels = draw.normal(3, 0.1, num_seeds)
    return {
        rate: {
            seed: level + CURVATURE * math.log(rate / optimum) ** 2 + draw.normal(0, noise)
            for seed, level in enumerate(levels)
        }
        for rate in grid
    }


def fit(losses: Losses, tokens: int = 1000) -> OptimumFit:
    return fit_optimum(losses, scale="s", tokens=tokens)


def is_about_95_percent(hits: int, draws: int) -> bool:
    """Within four standard deviations of what 95% give."""
    return abs(hits - 0.95 * draws) < 4 * math.sqrt(0.95 * 0.05 * draws)


def test_without_noise_the_optimum_is_exact() -> None:
    found = fit(planted(np.random.default_rng(0), 7e-3, 0.0))
    assert found.problem == ""
    assert found.optimum == pytest.approx(7e-3, rel=1e-6)
    assert found.curvature == pytest.approx(CURVATURE, rel=1e-6)
    assert found.high / found.low < 1.001


@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_intervals_hold_the_planted_optimum_as_often_as_they_say(noise: float) -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(DRAWS):
        optimum = float(np.exp(draw.uniform(np.log(5e-3), np.log(9e-3))))
        found = fit(planted(draw, optimum, noise))
        assert found.problem == ""
        hits += found.low <= optimum <= found.high
    assert is_about_95_percent(hits, DRAWS), hits


def test_the_power_law_predicts_a_longer_budget_as_often_as_it_says() -> None:
    draw = np.random.default_rng(2)
    budgets, exponent = (1e5, 2e5, 4e5, 8e5), -0.25
    hits = 0
    for _ in range(DRAWS):
        fits = [fit(planted(draw, 1e-2 * (t / 1e5) ** exponent, 0.01), int(t)) for t in budgets]
        law = fit_power_law(fits)
        assert law.problem == "" and law.num_budgets == 4
        _, low, high = law.at(3.2e6)
        hits += low <= 1e-2 * 32**exponent <= high
    # Budgets that scatter widen the interval and never narrow it, so it errs to the wide side.
    assert 0.93 * DRAWS <= hits <= 0.995 * DRAWS, hits


def test_the_power_law_is_exact_without_noise() -> None:
    draw = np.random.default_rng(0)
    fits = [fit(planted(draw, 8e-3 * (t / 1e5) ** -0.3, 1e-7), int(t)) for t in (1e5, 3e5)]
    law = fit_power_law(fits)
    assert law.exponent == pytest.approx(-0.3, abs=1e-3)
    assert law.at(1e6)[0] == pytest.approx(8e-3 * 10**-0.3, rel=1e-3)
    assert law.exponent_low < law.exponent < law.exponent_high
    assert law.problem == "" and fit_power_law(fits[:1]).problem.startswith("1 token budget with")


@pytest.mark.parametrize(
    ("optimum", "message"),
    [(1e-4, "the smallest of the grid; add smaller"), (1.0, "the largest of the grid; add larger")],
)
def test_a_minimum_at_the_edge_is_named_and_not_invented(optimum: float, message: str) -> None:
    found = fit(planted(np.random.default_rng(0), optimum, 0.001))
    assert message in found.problem
    assert math.isnan(found.optimum) and math.isnan(found.low)
    assert found.rates == GRID and len(found.means) == 6
    assert "0 token budgets" in fit_power_law([found]).problem


def test_runs_that_diverged_are_left_out_of_the_fit() -> None:
    losses = planted(np.random.default_rng(0), 4e-3, 0.0)
    losses[GRID[-1]][1] = math.nan
    losses[GRID[-2]][0] = math.nan
    found = fit(losses)
    assert found.optimum == pytest.approx(4e-3, rel=1e-6)
    assert math.isnan(found.means[-1]) and found.window[1] == pytest.approx(GRID[-3])


def test_a_minimum_beside_divergence_is_named() -> None:
    losses = planted(np.random.default_rng(0), 8e-3, 0.0)
    for rate in GRID[4:]:
        losses[rate][0] = math.nan
    found = fit(losses)
    assert f"lowest at {GRID[3]:g}, and runs with {GRID[4]:g} diverged" in found.problem
    for rate in GRID[2:]:
        losses[rate][0] = math.nan
    assert "2 learning rates have finite losses" in fit(losses).problem


def test_losses_that_hardly_differ_have_no_bounds() -> None:
    draw = np.random.default_rng(4)
    unbounded = 0
    for _ in range(50):
        found = fit(planted(draw, 6e-3, 0.5))
        unbounded += bool(found.problem) or math.isinf(found.high)
    assert unbounded > 25


def test_an_unbounded_optimum_says_nothing_of_the_power_law() -> None:
    draw = np.random.default_rng(0)
    sharp = [fit(planted(draw, 8e-3 * (t / 1e5) ** -0.3, 1e-3), int(t)) for t in (1e5, 3e5)]
    blunt = OptimumFit(**{**vars(sharp[0]), "tokens": 900_000, "low": 0.0, "high": math.inf})
    assert not blunt.is_bounded
    assert fit_power_law([*sharp, blunt]) == fit_power_law(sharp)
    assert "1 token budget " in fit_power_law([sharp[0], blunt]).problem


def test_one_seed_on_three_rates_has_no_interval() -> None:
    found = fit(planted(np.random.default_rng(0), 4e-3, 0.001, GRID[1:4], num_seeds=1))
    assert found.problem == "" and math.isnan(found.low) and found.freedom == 0


def test_seeds_of_which_a_run_is_missing_are_left_out() -> None:
    losses = planted(np.random.default_rng(0), 7e-3, 0.0)
    del losses[GRID[0]][2]
    losses[GRID[1]][2] = 0.0
    assert fit(losses).optimum == pytest.approx(7e-3, rel=1e-6)


def test_metrics_follow_from_the_record(tmp_path: Path) -> None:
    lines = [
        '{"step":1,"loss":4.0}',
        '{"step":2,"loss":3.0,"held_out_loss":5.0}',
        '{"step":3,"loss":3.75,"skipped":1.0,"bad_in_row":1.0}',
        '{"step":4,"loss":"NaN","held_out_loss":4.5,"rolled_back_from":5}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    names = ["held_out_loss", SPIKES, "loss", LOSS_RISE]
    found = metrics_of(tmp_path, names)
    assert (found["held_out_loss"], found[SPIKES]) == (4.5, 2.0)
    assert math.isnan(found["loss"]) and found[LOSS_RISE] == 0.75
    with pytest.raises(DataError, match="has no accuracy; it has bad_in_row, held_out_loss"):
        metrics_of(tmp_path, ["accuracy"])
