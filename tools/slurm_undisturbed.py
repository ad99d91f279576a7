"""What a run on Slurm kept of an undisturbed one, where its layout changed on the way.

The data ledger has to be the same bit by bit, for no layout may change what is drawn. So have loss
and gradient norm of the steps before the change. Afterwards sums are taken in another order, so
losses are only close.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.rundir.checkpoints import checkpoints_dir, complete_checkpoints, step_of
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.state import read_state
from phi4.rundir.step_log import read_metrics

CLOSE = 1e-6
"""Relative, of losses after the change."""
_COMPUTED = ("loss", "grad_norm")
_FIXED = ("learning_rate", "consumed_tokens")


@dataclass(frozen=True)
class Comparison:
    """Two finished runs.

    Attributes:
        same_stream: whether the data ledgers of all checkpoints that the undisturbed run has, and
            the tokens consumed after each step, are equal bit by bit.
        equal_until_step: up to which loss and gradient norm are.
        largest_loss_difference: relative, of the steps after that.
    """

    same_stream: bool
    equal_until_step: int
    largest_loss_difference: float

    def wrong(self, changed_after_step: int) -> str:
        """Return what is not as it should be; empty for nothing."""
        if not self.same_stream:
            return "another stream of samples"
        if self.equal_until_step < changed_after_step:
            return f"step {self.equal_until_step + 1}, before the change of layout, differs"
        if not self.largest_loss_difference <= CLOSE:
            return f"losses differ by {self.largest_loss_difference:.1e}"
        return ""


def compared(undisturbed: Path, found: Path) -> Comparison:
    """Compare the run directories of two finished runs."""
    before, after = _steps(undisturbed), _steps(found)
    ledgers, found_ledgers = _ledgers(undisturbed), _ledgers(found)
    same_stream = before.keys() == after.keys() and all(
        before[step][key] == after[step][key] for step in before for key in _FIXED
    )
    same_stream &= bool(ledgers) and all(
        found_ledgers.get(step) == line for step, line in ledgers.items()
    )
    equal_until = 0
    for step in sorted(before.keys() & after.keys()):
        if any(before[step][key] != after[step][key] for key in _COMPUTED):
            break
        equal_until = step
    differences = [
        abs(after[step]["loss"] - line["loss"]) / line["loss"]
        for step, line in before.items()
        if step > equal_until and step in after
    ]
    return Comparison(same_stream, equal_until, max(differences, default=0.0))


def _steps(run_dir: Path) -> dict[int, dict[str, float]]:
    return {int(line["step"]): line for line in read_metrics(run_dir / METRICS_FILE)}


def _ledgers(run_dir: Path) -> dict[int, bytes]:
    return {
        step_of(path): msgspec.json.encode(read_state(path).data, order="sorted")
        for path in complete_checkpoints(checkpoints_dir(run_dir))
    }
