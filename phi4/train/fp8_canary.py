"""The hook that compares FP8 with its absence now and then, and takes layers out of it."""

from collections.abc import Sequence

import msgspec

from phi4.config import PrecisionConfig
from phi4.engine.fp8_check import FP8Check, FP8Limits
from phi4.rundir.state import FP8Fallback, RunState
from phi4.train.hooks import Hook, Progress, RunContext


def fp8_canary(context: RunContext) -> Sequence[Hook]:
    """A `HookFactory`: none for a run without FP8.

    One that never compares has it too: it keeps the layers out of FP8 that left it before.
    """
    return [FP8Canary(context)] if context.recipe.precision.fp8 == "torch" else []


class FP8Canary(Hook):
    """Compares every `precision.fp8_check_every` steps, with the weights after the step.

    Every rank finds the same numbers, so every rank decides the same. A layer that left FP8 stays
    out of it: the run's state says so, in every checkpoint from then on.

    Args:
        context: the run.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._new: tuple[FP8Fallback, ...] = ()

    def start(self, state: RunState) -> None:
        """Leave out what left FP8 before."""
        self._go_on_from(state)

    def rewind(self, state: RunState) -> None:
        """The state still holds what the undone steps found."""
        self._go_on_from(state)

    def measure(self, progress: Progress) -> dict[str, float]:
        """The numbers of `check_numbers` where a comparison is due.

        A step that updated nothing is not compared, nor is a run whose layers all left FP8.

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
        """Add what the step found."""
        new, self._new = self._new, ()
        return msgspec.structs.replace(state, fp8_fallbacks=(*state.fp8_fallbacks, *new))

    def _go_on_from(self, state: RunState) -> None:
        layers = sorted({one.layer for one in state.fp8_fallbacks})
        self._context.engine.leave_fp8(layers)
        if layers:
            dtype = self._context.recipe.precision.dtype
            self._context.say(f"layers {', '.join(map(str, layers))} left FP8 and stay in {dtype}")


def limits_of(precision: PrecisionConfig) -> FP8Limits:
    """The recipe's."""
    return FP8Limits(
        loss_gap=precision.fp8_max_loss_gap,
        gradient_cosine=precision.fp8_min_gradient_cosine,
        underflow=precision.fp8_max_underflow,
        saturation=precision.fp8_max_saturation,
    )


def check_numbers(check: FP8Check) -> dict[str, float]:
    """fp8/loss_gap, fp8/gradient_cosine and by LAYER, fp8/underflow/CAST/LAYER and likewise
    fp8/saturation; fp8/fallback/LAYER = 1 for a layer that leaves.
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
