"""The hook that compares training with and without FP8 periodically, and takes layers out of it."""

from collections.abc import Sequence

import msgspec

from phi4.config import PrecisionConfig
from phi4.engine.fp8_deviation import FP8Check, FP8Limits
from phi4.rundir.state import FP8Fallback, RunState
from phi4.train.hooks import Hook, Progress, RunContext


def fp8_canary(context: RunContext) -> Sequence[Hook]:
    """A `HookFactory`; no hook for a run without FP8.

    A run that never compares has the hook too: it keeps layers that fell back earlier out of FP8.
    """
    return [FP8Canary(context)] if context.recipe.precision.fp8 == "torch" else []


class FP8Canary(Hook):
    """Compares every `precision.fp8_check_every` steps, with the weights after the step.

    All ranks compute the same numbers and so take the same decisions. A layer that left FP8 never
    returns to it: the run's state lists the layer, in every checkpoint from then on.

    Args:
        context: the run's context.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._new: tuple[FP8Fallback, ...] = ()

    def start(self, state: RunState) -> None:
        """Keep the layers that fell back in earlier steps out of FP8."""
        self._go_on_from(state)

    def rewind(self, state: RunState) -> None:
        """Restore the same layers: the state keeps what the undone steps found."""
        self._go_on_from(state)

    def measure(self, progress: Progress) -> dict[str, float]:
        """The numbers of `check_numbers` when a comparison is due.

        There is none after a step without an update, or once all layers have left FP8.

        Collectives: those of `Engine.check_fp8`.
        """
        context, every = self._context, self._context.recipe.precision.fp8_check_every
        is_due = every > 0 and progress.step % every == 0 and progress.result.updated
        if not is_due or not context.engine.fp8_layers:
            return {}
        with context.phases.during("fp8_check", progress.step):
            check = context.engine.check_fp8(
                progress.batches, context.objective, limits_of(context.recipe.precision)
            )
        self._new = tuple(
            FP8Fallback(progress.step, layer, reason) for layer, reason in check.fallbacks.items()
        )
        for new in self._new:
            context.say(
                f"step {new.step}: layer {new.layer} leaves FP8 and continues in "
                f"{context.recipe.precision.dtype}: {new.reason}"
            )
        fallen = (*progress.state.fp8_fallbacks, *self._new)
        context.engine.leave_fp8({one.layer for one in fallen})
        return check_numbers(check) | {"fp8/fallback_layers": len(fallen)}

    def remember(self, state: RunState) -> RunState:
        """Add the layers that fell back in this step."""
        new, self._new = self._new, ()
        return msgspec.structs.replace(state, fp8_fallbacks=(*state.fp8_fallbacks, *new))

    def _go_on_from(self, state: RunState) -> None:
        layers = sorted({one.layer for one in state.fp8_fallbacks})
        self._context.engine.leave_fp8(layers)
        if layers:
            dtype = self._context.recipe.precision.dtype
            self._context.say(f"layers {', '.join(map(str, layers))} left FP8 and stay in {dtype}")


def limits_of(precision: PrecisionConfig) -> FP8Limits:
    """The limits that the recipe sets."""
    return FP8Limits(
        loss_gap=precision.fp8_max_loss_gap,
        gradient_cosine=precision.fp8_min_gradient_cosine,
        underflow=precision.fp8_max_underflow,
        saturation=precision.fp8_max_saturation,
    )


def check_numbers(check: FP8Check) -> dict[str, float]:
    """fp8/loss_gap, fp8/gradient_cosine and by LAYER, fp8/underflow/CAST/LAYER and likewise
    fp8/saturation; fp8/fallback/LAYER = 1 for a layer that falls back.
    """
    numbers = {
        "fp8/loss_gap": check.distance.loss_gap,
        "fp8/gradient_cosine": check.distance.least_cosine,
    }
    for layer, cosine in enumerate(check.distance.gradient_cosines):
        numbers[f"fp8/gradient_cosine/{layer}"] = cosine
    for layer, by_cast in check.lost.items():
        for what, shares in by_cast.items():
            numbers[f"fp8/underflow/{what}/{layer}"] = shares.underflow
            numbers[f"fp8/saturation/{what}/{layer}"] = shares.saturation
    return numbers | {f"fp8/fallback/{layer}": 1 for layer in check.fallbacks}
