"""The hook that writes ledger.jsonl; see `phi4.rundir.ledger_log`."""

from pathlib import Path

from phi4.config import Recipe
from phi4.engine.agreement import decided_by_writer
from phi4.engine.platform import Platform
from phi4.rundir.ledger_log import counts_line
from phi4.rundir.names import LEDGER_FILE
from phi4.rundir.state import RunState
from phi4.rundir.step_log import StepLog
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress
from phi4.train.meter import roll_back_numbers


class LedgerRecord(Hook):
    """Writes the line of each step, on the writer rank.

    Args:
        recipe: the run's recipe.
        platform: this process.
    """

    def __init__(self, recipe: Recipe, platform: Platform) -> None:
        self._path = Path(recipe.run.dir) / LEDGER_FILE
        self._platform = platform
        self._file: StepLog | None = None
        self._status = "finished"

    def start(self, state: RunState) -> None:
        """Open the file and remove the lines of later steps.

        Raises:
            DataError: a line of the file is damaged; on every rank.

        Collectives: a broadcast of the outcome over all ranks.
        """

        def open_file() -> None:
            self._file = StepLog(self._path, state.step)

        decided_by_writer(self._platform, open_file)

    def act(self, progress: Progress) -> Decision:
        """Write the counts of all sources."""
        if self._file:
            numbers = counts_line(progress.state.data or {}) | roll_back_numbers(progress.state)
            self._file.log(progress.step, numbers)
        return CONTINUE

    def rewind(self, state: RunState) -> None:
        """Remove the lines of undone steps."""
        if self._file:
            self._file.rewind(state.step)

    def on_error(self, error: BaseException) -> None:
        """Note the failure: `close` then drops lines for which the disk has no space."""
        self._status = "failed"

    def close(self) -> None:
        """Close the file.

        Raises:
            DiskFullError: a finished run's lines do not fit on the disk.
        """
        if self._file:
            self._file.finish(self._status)
