"""The numbers of every step."""

import time

from phi4.rundir.state import RunState
from phi4.train.hooks import Hook, Progress


class Meter(Hook):
    """Measures loss, gradient norm, learning rate and speed."""

    def measure(self, progress: Progress) -> dict[str, float]:
        """loss, grad_norm, learning_rate, consumed_tokens, step_seconds, tokens_per_second.

        skipped = 1 besides, where loss or gradient was not finite or a spike and so changed
        nothing, with the number of such steps in a row as bad_in_row; and what `roll_back_numbers`
        says.
        """
        return {
            "loss": progress.result.loss,
            "grad_norm": progress.result.grad_norm,
            "learning_rate": progress.learning_rate,
            "consumed_tokens": progress.state.consumed_tokens,
            "step_seconds": progress.step_seconds,
            "tokens_per_second": progress.step_tokens / progress.step_seconds,
            **_skipped_numbers(progress),
            **roll_back_numbers(progress.state),
            **progress.result.metrics,
        }


def roll_back_numbers(state: RunState) -> dict[str, int]:
    """rolled_back_from and skipped_rows, for the step that follows a roll back; else nothing.

    Only skipped_rows where the recipe asked for the skip. They follow from the state, so that a run
    that was killed right after it records them too.
    """
    skips = [skip for skip in state.skips if skip.after_step == state.step - 1]
    if not skips:
        return {}
    numbers = {"skipped_rows": sum(skip.rows for skip in skips)}
    undone = [skip.last_undone for skip in skips if skip.last_undone > skip.after_step]
    return {"rolled_back_from": undone[-1]} | numbers if undone else numbers


def _skipped_numbers(progress: Progress) -> dict[str, float]:
    if progress.result.updated:
        return {}
    return {"skipped": 1.0, "bad_in_row": float(progress.state.numerics.bad_in_row)}


class Stopwatch:
    """Seconds between laps; monotonic."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last lap."""
        now = time.perf_counter()
        self._since, seconds = now, now - self._since
        return seconds
