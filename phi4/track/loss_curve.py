"""A run's training loss as a function of tokens, comparable across batch sizes."""

from dataclasses import dataclass

import numpy as np

from phi4.rundir.run_record import RunRecord


@dataclass(frozen=True)
class LossCurve:
    """Loss as a piecewise constant function of tokens: a step's loss applies to the step's tokens.

    Attributes:
        tokens: token counts at the ends of the steps, [n], increasing.
        losses: [n], finite.
        steps: step numbers, [n].
        begin: token count before the first step.
    """

    tokens: np.ndarray
    losses: np.ndarray
    steps: np.ndarray
    begin: float

    @staticmethod
    def of(record: RunRecord) -> "LossCurve":
        """Make the curve of the accepted steps with a finite loss."""
        lines = [line for line in record.steps if "loss" in line and "consumed_tokens" in line]
        losses = np.array([line["loss"] for line in lines], dtype=float)
        tokens = np.array([line["consumed_tokens"] for line in lines], dtype=float)
        steps = np.array([line["step"] for line in lines], dtype=int)
        is_kept = np.isfinite(losses)
        # A run that continues another run's ledger does not begin at 0.
        begin = tokens[0] - (tokens[1] - tokens[0]) if tokens.size > 1 else 0.0
        return LossCurve(tokens[is_kept], losses[is_kept], steps[is_kept], max(0.0, begin))

    def means(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return means between begins and ends, which are within the curve."""
        places = np.concatenate([[self.begin], self.tokens])
        integral = np.concatenate([[0.0], np.cumsum(self.losses * np.diff(places))])
        sums = np.interp(ends, places, integral) - np.interp(begins, places, integral)
        return sums / (ends - begins)

    def count(self, begin: float, end: float) -> int:
        """Count steps that end after `begin` and not after `end`."""
        first, last = np.searchsorted(self.tokens, [begin, end], side="right")
        return int(last - first)
