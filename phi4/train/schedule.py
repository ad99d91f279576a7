"""The learning rate: linear warm-up, then linear decay, counted in steps or in tokens."""

from phi4.config import OptimConfig, Recipe


def next_rate(recipe: Recipe, *, step: int, consumed_tokens: int) -> float:
    """Learning rate of the step that follows `step` completed ones; see `learning_rate`."""
    return learning_rate(
        recipe.optim,
        step=step,
        consumed_tokens=consumed_tokens,
        total_steps=recipe.run.steps,
        step_tokens=step_tokens(recipe),
    )


def decay_end(recipe: Recipe) -> int:
    """Where the decay ends, in the schedule's unit."""
    unit = step_tokens(recipe) if recipe.optim.schedule_unit == "tokens" else 1
    return recipe.optim.decay or recipe.run.steps * unit


def step_tokens(recipe: Recipe) -> int:
    """Tokens of one step."""
    return recipe.batch.global_batch_size * recipe.data.sequence_length


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
