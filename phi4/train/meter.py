"""The numbers of every step."""

import time

from phi4.rundir.state import RunState
from phi4.train.hooks import Hook, Progress


class Meter(Hook):
    """Measures loss, gradient norm, learning rate and speed."""

    def measure(self, progress: Progress) -> dict[str, float]:
        """loss, grad_norm, learning_rate, consumed_tokens, step_seconds, tokens_per_second.

        skipped = 1 besides, where the gradient was not finite and so changed nothing; and what
        `roll_back_numbers` says.
        """
        return {
            "loss": progress.result.loss,
            "grad_norm": progress.result.grad_norm,
            "learning_rate": progress.learning_rate,
            "consumed_tokens": progress.state.consumed_tokens,
            "step_seconds": progress.step_seconds,
            "tokens_per_second": progress.step_tokens / progress.step_seconds,
            **({} if progress.result.updated else {"skipped": 1.0}),
            **roll_back_numbers(progress.state),
            **progress.result.metrics,
        }


def roll_back_numbers(state: RunState) -> dict[str, int]:
    """rolled_back_from and skipped_rows, for the step that follows a roll back; else nothing.

    They follow from the state, so that a run that was killed right after it records them too.
    """
    skips = [skip for skip in state.skips if skip.after_step == state.step - 1]
    if not skips:
        return {}
    return {
        "rolled_back_from": skips[-1].last_undone,
        "skipped_rows": sum(skip.rows for skip in skips),
    }


class Stopwatch:
    """Seconds between laps; monotonic."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last lap."""
        now = time.perf_counter()
        self._since, seconds = now, now - self._since
        return seconds
