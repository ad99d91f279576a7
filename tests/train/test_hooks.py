"""What a step's record says."""

import pytest

from phi4.engine.step import StepResult
from phi4.rundir.state import RunState
from phi4.train.hooks import Progress
from phi4.train.meter import Meter


@pytest.mark.parametrize("updated", [True, False])
def test_record_says_that_a_step_changed_nothing(updated):
    result = StepResult(loss=2.0, weight=8.0, grad_norm=1.0, updated=updated, metrics={})
    progress = Progress(
        state=RunState(),
        total_steps=2,
        step_tokens=8,
        step_seconds=0.5,
        learning_rate=1e-3,
        result=result,
    )
    record = Meter().measure(progress)

    assert record["tokens_per_second"] == 16
    assert record.get("skipped") == (None if updated else 1)
