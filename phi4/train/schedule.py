"""The learning rate: linear warm-up, then linear decay, counted in steps or in tokens."""

from phi4.config import OptimConfig


def learning_rate(
    optim: OptimConfig, *, step: int, consumed_tokens: int, total_steps: int, step_tokens: int
) -> float:
    """Learning rate of the step that follows `step` completed ones.

    Args:
        optim: peak, end, warm-up and decay.
        step: completed steps.
        consumed_tokens: tokens of all completed steps.
        total_steps: length of the run; where decay=0 ends in steps.
        step_tokens: tokens of one step; with schedule_unit=tokens decay=0 ends at
            total_steps * step_tokens.

    Source: report, section 3: warm-up to the peak and decay; that both are linear is our reading.
    """
    if optim.schedule_unit == "tokens":
        now, first, end = consumed_tokens, step_tokens, total_steps * step_tokens
    else:
        now, first, end = step, 1, total_steps
    end = optim.decay or end
    # The first step already takes one unit of warm-up, so its rate is not zero.
    now += first
    if now <= optim.warmup:
        return optim.learning_rate * now / optim.warmup
    if now >= end:
        return optim.min_learning_rate
    fall = (now - optim.warmup) / (end - optim.warmup)
    return optim.learning_rate + (optim.min_learning_rate - optim.learning_rate) * fall
