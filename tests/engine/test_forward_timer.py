"""What counts as the time of a step's forward passes."""

import torch

from phi4.engine.forward_timer import ForwardTimer
from tests.support.waiting import compute

SECONDS = 0.02


def one_pass(timer: ForwardTimer) -> None:
    with timer.measured():
        compute(SECONDS)


def test_passes_of_a_step_add_up_and_the_next_step_begins_at_zero() -> None:
    timer = ForwardTimer(torch.device("cpu"))
    one_pass(timer)
    one_pass(timer)
    assert timer.next_step() >= 2 * SECONDS
    assert timer.next_step() == 0.0


def test_passes_without_gradients_do_not_count() -> None:
    timer = ForwardTimer(torch.device("cpu"))
    with torch.no_grad():
        one_pass(timer)
    assert timer.next_step() == 0.0
