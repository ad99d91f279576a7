"""The console view of a run: a progress bar on a terminal, plain lines elsewhere.

A log file gets at most one line per second of training, but never misses an evaluation or the last
step. Other lines of the run go through `say`, which does not disturb the bar.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from phi4.track.record import Status

_LINE_SECONDS = 1.0


class ConsoleTracker:
    """Shows a run's progress; a `Tracker`.

    Args:
        total_steps: where the run ends.
        resume_step: completed steps of earlier attempts.
        stream: a terminal or a file; standard output when None.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._resume_step = resume_step
        self._clock = clock
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        has_bar = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = self._new_bar() if has_bar else None
        self._last_line_at = -math.inf
        self._held_back: str | None = None

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text)
        self._console.file.flush()

    def start(self, params: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        """Show the bar."""
        if self._bar:
            total, done = self._total_steps, self._resume_step
            self._bar.add_task("", total=total, completed=done, numbers="", eta="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the step's loss, learning rate and speed, and the estimated time to the end."""
        is_news = not _NEWS.isdisjoint(metrics)
        if self._bar:
            numbers = _numbers(metrics, _ON_THE_BAR)
            eta = _eta(metrics)
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=numbers, eta=eta)
            if is_news:
                self.say(f"step {step}  {_numbers(metrics, _IN_A_LINE)}")
            return
        numbers = _numbers(metrics, _IN_A_LINE)
        line = f"step {step}/{self._total_steps}  {numbers}  {_eta(metrics)}".rstrip()
        is_last = step >= self._total_steps
        if is_news or is_last or self._clock() - self._last_line_at >= _LINE_SECONDS:
            self.say(line)
            self._last_line_at, self._held_back = self._clock(), None
        else:
            self._held_back = line

    def rewind(self, step: int) -> None:
        """Set the bar back; the line of an undone step is not shown any more."""
        self._held_back = None
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def finish(self, status: Status) -> None:
        """Restore the terminal; after a failure, also show the last step.

        A run that stops early has saved its last step and said so: its line would come too late.
        """
        if self._bar:
            self._bar.stop()
        elif status == "failed" and self._held_back:
            self.say(self._held_back)

    def _new_bar(self) -> Progress:
        return Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
        )


_TEXTS = {
    "loss": "loss {:.4f}",
    "held_out_loss": "held-out loss {:.4f}",
    "grad_norm": "grad norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "skipped": "bad step: weights unchanged",
    "rolled_back_from": "rolled back from step {:.0f}",
    "skipped_rows": "{:,.0f} rows skipped",
}
_NEWS = {"held_out_loss", "skipped", "rolled_back_from"}
"""Metrics whose step is always shown in a log file."""

_IN_A_LINE = tuple(_TEXTS)
_ON_THE_BAR = ("loss", "learning_rate", "tokens_per_second")


def _eta(metrics: Mapping[str, float]) -> str:
    """The time to the end; empty where the metrics have none."""
    seconds = metrics.get("eta_seconds")
    return "" if seconds is None else f"eta {timedelta(seconds=round(seconds))}"


def _numbers(metrics: Mapping[str, float], keys: Sequence[str]) -> str:
    return "  ".join(_TEXTS[key].format(metrics[key]) for key in keys if key in metrics)
