"""The hook that writes ledger.jsonl; see `phi4.rundir.ledger_log`."""

from pathlib import Path

from phi4.config import Recipe
from phi4.rundir.ledger_log import counts_line
from phi4.rundir.names import LEDGER_FILE
from phi4.rundir.step_log import StepLog
from phi4.train.hooks import Hook, Progress


class LedgerRecord(Hook):
    """Writes the line of each step; one process of a run has this hook.

    Args:
        recipe: the run.
        resume_step: the step that training goes on from; lines of later ones are cut off.
    """

    def __init__(self, recipe: Recipe, resume_step: int) -> None:
        self._file = StepLog(Path(recipe.run.dir) / LEDGER_FILE, resume_step)

    def act(self, progress: Progress) -> None:
        """Write the counts of all sources."""
        self._file.log(progress.step, counts_line(progress.state.data))
        if progress.is_last:
            self._file.finish("finished")
