"""Linear warm-up, linear decay, in steps and in tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.config import OptimConfig
from phi4.train.schedule import learning_rate


def _rates(optim: OptimConfig, total_steps: int, step_tokens: int = 1) -> list[float]:
    return [
        learning_rate(
            optim,
            step=step,
            consumed_tokens=step * step_tokens,
            total_steps=total_steps,
            step_tokens=step_tokens,
        )
        for step in range(total_steps)
    ]


def test_golden_values() -> None:
    optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.2, warmup=4, decay=8)
    expected = [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert _rates(optim, 10) == pytest.approx(expected)


@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 4096))
def test_tokens_and_steps_agree(warmup: int, more: int, step_tokens: int) -> None:
    total = warmup + more
    in_steps = OptimConfig(learning_rate=3e-4, warmup=warmup)
    in_tokens = in_steps.model_copy(
        update={"schedule_unit": "tokens", "warmup": warmup * step_tokens}
    )
    assert _rates(in_tokens, total, step_tokens) == pytest.approx(_rates(in_steps, total))


@given(st.integers(0, 20), st.integers(2, 40))
def test_rate_rises_to_the_peak_then_falls_to_the_end(warmup: int, total: int) -> None:
    optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.1, warmup=warmup)
    rates = _rates(optim, total)
    rise, fall = rates[:warmup], rates[max(warmup - 1, 0) :]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    assert all(0 < rate <= 1 for rate in rates)
    if warmup < total:
        assert rates[-1] == pytest.approx(0.1)
