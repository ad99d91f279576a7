"""What happens around a step besides the step: a hook measures, or acts once the step is recorded.

Order in the loop: the step, every hook's `measure` into the step's one record, the record to the
trackers, every hook's `act`. A save therefore never precedes the record of the step it contains.
"""

import time
from dataclasses import dataclass

from phi4.engine.step import StepResult
from phi4.rundir.state import RunState


@dataclass(frozen=True)
class Progress:
    """Where the run stands after a step."""

    state: RunState
    total_steps: int
    step_tokens: int
    step_seconds: float
    learning_rate: float
    result: StepResult

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.state.step

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this step."""
        return self.step >= self.total_steps

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.is_last or (every > 0 and self.step % every == 0)


class Hook:
    """Base of all hooks; every rank calls every hook, so a hook may use collectives."""

    def measure(self, progress: Progress) -> dict[str, float]:
        """Numbers for the step's record."""
        return {}

    def act(self, progress: Progress) -> None:
        """Anything else, after the record is written."""


class Meter(Hook):
    """The numbers of every step."""

    def measure(self, progress: Progress) -> dict[str, float]:
        """loss, grad_norm, learning_rate, consumed_tokens, step_seconds, tokens_per_second.

        skipped = 1 besides, where the gradient was not finite and so changed nothing.
        """
        return {
            "loss": progress.result.loss,
            "grad_norm": progress.result.grad_norm,
            "learning_rate": progress.learning_rate,
            "consumed_tokens": progress.state.consumed_tokens,
            "step_seconds": progress.step_seconds,
            "tokens_per_second": progress.step_tokens / progress.step_seconds,
            **({} if progress.result.updated else {"skipped": 1.0}),
            **progress.result.metrics,
        }


class Stopwatch:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last lap."""
        now = time.perf_counter()
        self._since, seconds = now, now - self._since
        return seconds
