"""Run a recipe repeatedly with injected faults, until a given number of faults has occurred.

A short run is disturbed in attempt after attempt until it finishes; then another begins. Every
finished run must equal an undisturbed one. Moments are drawn from the seed, as fractions of an
undisturbed run's duration; where exactly they fall depends on the machine's speed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, Protocol

from phi4.config import Recipe, dump_toml, with_overrides
from phi4.errors import WorkerError
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics
from phi4.verify.drills.record import DrilledRun, differences, missing_time, read_record
from phi4.verify.drills.watched_run import WatchedRun, recorded_step, saved_steps, started

Phase = Literal["start-up", "training", "save"]

STEPS, SAVE_EVERY, EVALUATE_EVERY, KEEP = 12, 3, 2, 8
"""Steps of every run: few, with most of the time spent in evaluations and saves."""

_TIMEOUT_FACTOR = 30
"""Time limit of an attempt, as a multiple of an undisturbed run's time, plus ten minutes."""


@dataclass(frozen=True)
class DrillPace:
    """Durations of an undisturbed run, in seconds."""

    start: float
    """From taking the lease to the record of the first step."""
    step: float
    """From one step to the next, evaluations and saves included, on average."""


@dataclass(frozen=True)
class Moment:
    """When a fault happens.

    Attributes:
        phase: start-up: a delay after the lease was taken. training: a number of steps, then a
            delay. save: a number of steps, then at the next write of a checkpoint.
        num_steps: steps of the attempt that are recorded before it.
        delay: seconds.
    """

    phase: Phase
    num_steps: int
    delay: float

    @staticmethod
    def drawn(random: Random, pace: DrillPace) -> "Moment":
        """Draw a moment of an attempt; a quarter of them during start-up, another quarter during a
        save."""
        phases: tuple[Phase, ...] = ("start-up", "training", "training", "save")
        phase = random.choice(phases)
        if phase == "start-up":
            return Moment(phase, 0, random.uniform(0, pace.start))
        delay = random.uniform(0, pace.step) if phase == "training" else 0.0
        return Moment(phase, random.randint(1, 3), delay)

    def arrive(self, attempt: WatchedRun) -> bool:
        """Wait for it; return False if the run ended before."""
        if not attempt.wait_until(attempt.has_begun):
            return False
        if not attempt.wait_until(lambda: attempt.has_recorded(self.num_steps)):
            return False
        if self.phase == "save" and not attempt.wait_until(attempt.is_saving):
            return False
        at = time.monotonic() + self.delay
        return attempt.wait_until(lambda: time.monotonic() >= at)


@dataclass(frozen=True)
class FaultOutcome:
    """A fault and its outcome.

    Attributes:
        what: the fault.
        phase: phase in which it happened.
        exit_code: exit code of the attempt.
        seconds: from the fault to the end of the attempt.
        step: newest checkpoint at that time.
        has_saved: whether the attempt left a new checkpoint.
        wrong: what is wrong; empty if nothing is.
    """

    what: str
    phase: str
    exit_code: int
    seconds: float
    step: int
    has_saved: bool
    wrong: str

    def describe(self) -> str:
        """Return a one-line description."""
        return (
            f"{self.what} during {self.phase}: code {self.exit_code} after {self.seconds:.1f} s, "
            f"newest checkpoint {self.step or 'none'}, {self.wrong or 'ok'}"
        )


class Fault(Protocol):
    """An injected fault, and the required outcome of the attempt."""

    def strike(self, attempt: WatchedRun, random: Random) -> str:
        """Inject the fault; return what was done."""

    def verdict(self, attempt: WatchedRun, code: int, before: set[int], after: set[int]) -> str:
        """Return what is wrong with the end of the attempt, or an empty string.

        Args:
            attempt: the attempt that ended.
            code: its exit code.
            before: steps of the complete checkpoints when it began.
            after: steps of the complete checkpoints when it ended.
        """


class Drill:
    """Runs of one recipe, with faults.

    Args:
        recipe: a checked recipe; its steps, saves and evaluations are replaced.
        work_dir: directory for all files.
        random: source of moments and victims.
        say: prints a line per fault and run.
    """

    def __init__(
        self, recipe: Recipe, work_dir: Path, random: Random, say: Callable[[str], None]
    ) -> None:
        self._recipe = recipe
        self._work_dir = work_dir
        self._random = random
        self._say = say
        self._seconds = 24 * 3600.0
        self.num_runs = 0

    def undisturbed(self) -> tuple[DrilledRun, DrillPace]:
        """Return the run that all others must equal.

        Raises:
            WorkerError: it fails.
        """
        path, recipe = self._begin_run("undisturbed")
        run_dir = Path(recipe.run.dir)
        since = time.monotonic()
        with started(path, recipe, self._seconds) as attempt:
            attempt.wait_until(attempt.has_begun)
            begun = time.monotonic()
            attempt.wait_until(lambda: attempt.has_recorded(1))
            stepped = time.monotonic()
            if code := attempt.end():
                raise WorkerError(f"the undisturbed run ended with {code}: {attempt.log}")
        now = time.monotonic()
        self._seconds = 600 + _TIMEOUT_FACTOR * (now - since)
        return read_record(run_dir), DrillPace(stepped - begun, (now - stepped) / (STEPS - 1))

    def run(self, fault: Fault, num_faults: int) -> tuple[list[FaultOutcome], list[str]]:
        """Inject a number of faults; return them, and the differences of the runs that finished
        after them."""
        expected, pace = self.undisturbed()
        self._say(f"undisturbed: final loss {expected.final_loss!r}")
        outcomes: list[FaultOutcome] = []
        differing: list[str] = []
        while len(outcomes) < num_faults:
            self.num_runs += 1
            path, recipe = self._begin_run(f"run_{self.num_runs}")
            run_dir = Path(recipe.run.dir)
            while not _is_finished(run_dir):
                moment = None
                if len(outcomes) < num_faults:
                    moment = Moment.drawn(self._random, pace)
                outcome = self._attempt(path, recipe, moment, fault)
                if outcome is not None:
                    outcomes.append(outcome)
                    self._say(f"{len(outcomes)}: {outcome.describe()}")
                    if outcome.wrong:
                        return outcomes, differing
            found = differences(expected, read_record(run_dir)) + missing_time(run_dir)
            differing += [f"run {self.num_runs}: {line}" for line in found]
            self._say(f"run {self.num_runs} finished, {len(found)} differences")
        return outcomes, differing

    def _attempt(
        self, path: Path, recipe: Recipe, moment: Moment | None, fault: Fault
    ) -> FaultOutcome | None:
        """Start one attempt, and inject a fault unless it ends before; None without one."""
        run_dir = Path(recipe.run.dir)
        before = saved_steps(run_dir)
        with started(path, recipe, self._seconds) as attempt:
            if moment is None or not moment.arrive(attempt):
                if code := attempt.end():
                    raise WorkerError(f"a run ended with {code} by itself: {attempt.log}")
                return None
            phase: str = "save" if attempt.is_saving() else moment.phase
            what, since = fault.strike(attempt, self._random), time.monotonic()
            code = attempt.end()
            seconds = time.monotonic() - since
        if code == 0 and _is_finished(run_dir):
            # The fault came too late to take effect.
            return None
        if _left_evaluation(self._recipe, run_dir):
            phase = "evaluation"
        after = saved_steps(run_dir)
        wrong = fault.verdict(attempt, code, before, after)
        return FaultOutcome(
            what, phase, code, seconds, max(after, default=0), bool(after - before), wrong
        )

    def _begin_run(self, name: str) -> tuple[Path, Recipe]:
        """Make a recipe with its own run directory, and write its file."""
        run_dir = self._work_dir / name
        recipe = with_overrides(
            self._recipe,
            [
                f"run.dir={run_dir}",
                f"run.steps={STEPS}",
                f"checkpoint.every={SAVE_EVERY}",
                f"checkpoint.keep={KEEP}",
                f"evaluation.every={EVALUATE_EVERY}",
                "tracking.mlflow=false",
            ],
        )
        path = run_dir.with_suffix(".toml")
        path.write_text(dump_toml(recipe), encoding="utf-8")
        return path, recipe


def _left_evaluation(recipe: Recipe, run_dir: Path) -> bool:
    """Return whether the last recorded step lacks an evaluation that was due."""
    step = recorded_step(run_dir)
    if not recipe.data.held_out or not step or step % EVALUATE_EVERY:
        return False
    return "held_out_loss" not in read_metrics(run_dir / METRICS_FILE)[-1]


def _is_finished(run_dir: Path) -> bool:
    return STEPS in saved_steps(run_dir) and (run_dir / METRICS_FILE).is_file()
