"""What is a spike and what is not, on curves whose spikes are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.config import ReliabilityConfig
from phi4.engine.step_values import StepResult
from phi4.rundir.state import Numerics, RunState
from phi4.train.reliability.spikes import SpikeDetector, describe

DEFAULT = ReliabilityConfig()
DETECTOR = SpikeDetector(DEFAULT.spike_deviations, DEFAULT.spike_window)


def healthy(seed: int, num_steps: int, noise: float) -> list[StepResult]:
    """A run: the loss falls from ln(vocabulary), the norm falls, rises in warm-up, and settles."""
    random = np.random.default_rng(seed)
    step = np.arange(num_steps)
    losses = 2.0 + 9.0 / (1.0 + step / 80.0) ** 0.7
    losses += noise * 0.2 * losses * random.standard_normal(num_steps)
    norms = 0.4 + 6.0 * np.exp(-step / 40.0) + 1.5 * np.exp(-(((step - 600.0) / 250.0) ** 2))
    norms *= np.exp(noise * random.standard_t(8, num_steps))
    return list(map(result, losses.tolist(), norms.tolist()))


def result(loss: float, grad_norm: float) -> StepResult:
    return StepResult(loss=loss, weight=1.0, grad_norm=grad_norm, updated=True, metrics={})


def judged(curve: list[StepResult], detector: SpikeDetector = DETECTOR) -> list[int]:
    """Indexes of the steps whose update is skipped."""
    past, bad = Numerics(), []
    for index, one in enumerate(curve):
        limits = detector.limits(past)
        updated = one.loss <= limits.loss and one.grad_norm <= limits.grad_norm
        bad += [] if updated else [index]
        past = detector.following(past, replace(one, updated=updated))
    return bad


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
def test_healthy_run_of_10000_steps_has_no_spike(noise: float) -> None:
    assert judged(healthy(1, 10_000, noise)) == []


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    noise=st.floats(0.0, 0.1),
    at=st.integers(200, 398),
    width=st.integers(1, 6),
    kind=st.sampled_from(["loss", "grad_norm"]),
)
def test_planted_spikes_are_found_and_nothing_else(
    seed: int, noise: float, at: int, width: int, kind: str
) -> None:
    curve = healthy(seed, 400, noise)
    planted = list(range(at, min(at + width, 400)))
    for index in planted:
        # More than the noise, and the fall of loss and norm within the window, explain.
        factor = {"loss": 4.0, "grad_norm": 200.0}[kind]
        curve[index] = replace(curve[index], **{kind: factor * getattr(curve[index], kind)})
    assert judged(curve) == planted


def test_spike_is_found_in_a_calm_run_by_its_least_size() -> None:
    calm = [result(2.0, 0.5)] * 200
    assert judged([*calm, result(2.19, 0.99)]) == []
    assert judged([*calm, result(2.21, 0.5)]) == [200]
    assert judged([*calm, result(2.0, 1.01)]) == [200]
    assert judged([*[result(0.01, 0.5)] * 200, result(0.05, 0.5), result(0.07, 0.5)]) == [201]


def test_nothing_is_looked_for_before_half_a_window_or_with_no_deviations() -> None:
    wild = [result(2.0, 0.5)] * 63 + [result(99.0, 99.0)]
    assert judged(wild) == []
    assert judged([result(2.0, 0.5), *wild]) == [64]
    assert judged([result(2.0, 0.5)] * 300 + wild, SpikeDetector(0.0, 128)) == []


def test_bad_steps_are_counted_and_leave_no_trace_in_the_window() -> None:
    detector = SpikeDetector(12.0, 4)
    past = Numerics()
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        past = detector.following(past, result(loss, math.exp(loss)))
    assert past.losses == (2.0, 3.0, 4.0, 5.0)
    assert past.log_norms == pytest.approx((2.0, 3.0, 4.0, 5.0))
    bad = replace(result(math.nan, math.inf), updated=False)
    twice = detector.following(detector.following(past, bad), bad)
    assert (twice.losses, twice.log_norms, twice.bad_in_row) == (past.losses, past.log_norms, 2)
    assert detector.following(twice, result(1.0, 1.0)).bad_in_row == 0


def test_a_gradient_of_zeros_and_huge_norms_are_no_error() -> None:
    detector = SpikeDetector(12.0, 2)
    past = detector.following(Numerics(), result(1.0, 0.0))
    past = detector.following(past, result(1.0, 1e300))
    assert detector.limits(past).grad_norm == math.inf


def test_limits_are_the_same_bits_after_a_resume() -> None:
    past = Numerics()
    for one in healthy(3, 150, 0.1):
        past = DETECTOR.following(past, one)
    saved = RunState.from_json(RunState(numerics=past).to_json()).numerics
    assert saved == past and DETECTOR.limits(saved) == DETECTOR.limits(past)


def test_what_is_wrong_is_said() -> None:
    limits = DETECTOR.limits(Numerics((2.0,) * 64, (0.0,) * 64))
    assert describe(result(2.5, 3.0), limits) == (
        "loss 2.5 is a spike (above 2.2) and gradient norm 3 is a spike (above 2)"
    )
    assert describe(result(math.nan, 1.0), limits) == "loss is nan"
