"""Do to a run what clusters do to runs, and fill the table of docs/faults.md with what happened.

Every row is a real `phi4 train` of the demo's tiny recipe on two pipeline ranks, saved every ten
steps. The fault strikes after step 25, so a run that cannot save loses five steps. Then the same
command is given again, without the fault.

    python -m tools.fault_table              # all of them; appends to benchmarks/faults.jsonl
    python -m tools.fault_table --only twice # one of them
    python -m tools.fault_table --docs       # only writes the page, from the newest rows
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint, step_of
from phi4.rundir.names import METRICS_FILE, SAVE_NOW_FILE, STOP_FILE
from phi4.rundir.step_log import read_metrics
from phi4.verify.measured_rows import append_row
from tools.marked_block import replace_block

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "faults.jsonl"
PAGE = ROOT / "docs" / "faults.md"
RECIPE = "examples/recipes/tiny_pretrain.toml"
FAULT_STEP = 25
LAYOUT = (
    "parallel.tensor=1",
    "parallel.sequence=false",
    "parallel.pipeline=2",
    "checkpoint.every=10",
    "evaluation.every=0",
    "evaluation.batches=1",
    "run.steps=60",
)
_TIMEOUT_SECONDS = 600.0


class Run:
    """A run of two ranks that the fault is done to."""

    def __init__(self, run_dir: Path, overrides: Sequence[str]) -> None:
        self.run_dir = run_dir
        number = len(list(run_dir.parent.glob("output_*")))
        self.log = run_dir.with_name(f"output_{number}")
        self._words = [f"run.dir={run_dir}", *LAYOUT, *overrides]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "phi4", "train", RECIPE, *self._words],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has recorded a step."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while self.last_step() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no step {step}; the run said:\n{self.output()}")
            time.sleep(0.05)

    def last_step(self) -> int:
        """Return the newest recorded step; 0 before the first."""
        path = self.run_dir / METRICS_FILE
        lines = read_metrics(path) if path.exists() else []
        return lines[-1]["step"] if lines else 0

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(p for p in children if p.environ().get("RANK") == str(number))

    def end(self) -> int:
        """Exit code, once it ended."""
        return self.process.wait(timeout=_TIMEOUT_SECONDS)

    def output(self) -> str:
        """Everything that the launcher printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def saved_step(self) -> int:
        """Step of the newest complete checkpoint; 0 without one."""
        newest = latest_checkpoint(checkpoints_dir(self.run_dir))
        return 0 if newest is None else step_of(newest)


def _signal_launcher(number: int) -> Callable[[Run], None]:
    return lambda run: run.process.send_signal(number)


def _signal_rank(rank: int, number: int) -> Callable[[Run], None]:
    return lambda run: run.rank(rank).send_signal(number)


def _signal_all(run: Run) -> None:
    for process in (run.rank(0), run.rank(1), run.process):
        process.send_signal(signal.SIGUSR1)


def _touch(name: str) -> Callable[[Run], None]:
    return lambda run: (run.run_dir / name).touch()


def _start_twice(run: Run) -> None:
    second = Run(run.run_dir, ())
    second.end()
    run.process.send_signal(signal.SIGINT)
    run.end()
    # The row is about the second start.
    run.process, run.log = second.process, second.log


def _change_model(run: Run) -> None:
    run.end()
    other = Run(run.run_dir, ("model.rms_norm_eps=1e-6",))
    other.end()
    run.process, run.log = other.process, other.log


def _nothing(run: Run) -> None:
    """The recipe itself is the fault."""


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        text: what happens, for the page.
        act: done after FAULT_STEP.
        overrides: overrides of the recipe, besides LAYOUT.
        waits: whether the run gets to FAULT_STEP before `act`.
        disk_mib: size of the disk that the run is on, where it is a small one; takes root.
    """

    text: str
    act: Callable[[Run], None]
    overrides: tuple[str, ...] = ()
    waits: bool = True
    disk_mib: int | None = None


_QUICK = ("reliability.silence_seconds=5",)
FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "term": Fault("SIGTERM to the launcher", _signal_launcher(signal.SIGTERM)),
        "usr1": Fault("SIGUSR1 to the launcher", _signal_launcher(signal.SIGUSR1)),
        "term-rank": Fault("SIGTERM to one rank only", _signal_rank(1, signal.SIGTERM)),
        "usr1-all": Fault("SIGUSR1 to every process, as Slurm does", _signal_all),
        "stop-file": Fault("a file `stop` in run.dir", _touch(STOP_FILE)),
        "save-file": Fault("a file `save_now` in run.dir", _touch(SAVE_NOW_FILE)),
        "interrupt": Fault("Ctrl-C", _signal_launcher(signal.SIGINT)),
        "kill-rank-0": Fault("kill -9 of rank 0", _signal_rank(0, signal.SIGKILL)),
        "kill-rank-1": Fault("kill -9 of rank 1", _signal_rank(1, signal.SIGKILL)),
        "kill-launcher": Fault("kill -9 of the launcher", _signal_launcher(signal.SIGKILL)),
        "stop-rank-0": Fault("SIGSTOP of rank 0", _signal_rank(0, signal.SIGSTOP), _QUICK),
        "stop-rank-1": Fault("SIGSTOP of rank 1", _signal_rank(1, signal.SIGSTOP), _QUICK),
        "twice": Fault("the same command again while the first one runs", _start_twice),
        "diverged": Fault(
            "a learning rate of 3000 without clipping",
            _nothing,
            ("optim.learning_rate=3000", "optim.clip_grad=0", "optim.warmup=0"),
            waits=False,
        ),
        "other-model": Fault(
            "the same run.dir with another model", _change_model, ("run.steps=30",)
        ),
        "disk-full": Fault("a disk that holds two checkpoints", _nothing, waits=False, disk_mib=24),
    }
)


def strike(name: str, directory: Path) -> dict[str, object]:
    """Do a fault to a run, and start the run again.

    Returns:
        The row: exit code, last line, steps that were done and not saved, and where the same
        command resumed; empty if it did not.
    """
    fault, place = FAULTS[name], directory / name
    place.mkdir()
    if fault.disk_mib is None:
        return _struck(name, fault, place)
    size = f"size={fault.disk_mib}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", place], check=True)
    try:
        return _struck(name, fault, place)
    finally:
        subprocess.run(["umount", place], check=True)


def _struck(name: str, fault: Fault, place: Path) -> dict[str, object]:
    run = Run(place / "run", fault.overrides)
    if fault.waits:
        run.wait_for_step(FAULT_STEP)
    fault.act(run)
    code = run.end()
    # The console may still show a step after the line that says why the run ends.
    lines = [s for s in run.output().splitlines() if s.strip() and not re.match(r"step \d+/", s)]
    done, saved = run.last_step(), run.saved_step()
    again = Run(run.run_dir, ())
    again.end()
    resumed = re.findall(r"resumed from \S+ \(step (\d+)\)", again.output())
    return {
        "benchmark": "fault",
        "fault": name,
        "text": fault.text,
        "exit_code": code if code >= 0 else 128 - code,
        "last_line": _shown(lines[-1], run.run_dir),
        "steps_lost": max(0, done - saved),
        "resumed_from": int(resumed[-1]) if resumed else None,
        "recipe": " ".join([RECIPE, *LAYOUT, *fault.overrides]),
    }


def _shown(line: str, run_dir: Path) -> str:
    """Return a line without what differs from run to run: directories, pids, times of day."""
    line = line.replace(str(run_dir), "RUN")
    line = re.sub(r"pid \d+", "pid N", line)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", line)


def newest_rows() -> list[dict[str, object]]:
    """Return the newest row of every fault, in the order of FAULTS."""
    rows = {}
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["fault"]] = row
    return [rows[name] for name in FAULTS if name in rows]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| fault | exit code | last line | steps lost |", "|---|---|---|---|"]
    for row in rows:
        said = str(row["last_line"]).replace("|", "\\|")
        fault = FAULTS[str(row["fault"])].text
        lines.append(f"| {fault} | {row['exit_code']} | {said} | {row['steps_lost']} |")
    return "\n".join(lines)


def page_with(rows: Sequence[Mapping[str, object]]) -> str:
    """docs/faults.md with the table of these rows."""
    return replace_block(PAGE.read_text(encoding="utf-8"), "faults", table(rows))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=FAULTS, action="append", help="one fault; repeatable")
    parser.add_argument("--docs", action="store_true", help="only write docs/faults.md")
    options = parser.parse_args()
    if not (ROOT / "runs/demo/data").exists():
        subprocess.run([sys.executable, "-m", "phi4", "data", "demo"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(prefix="phi4_faults_") as scratch:
        for name in () if options.docs else options.only or FAULTS:
            row = strike(name, Path(scratch))
            print(f"{name}: exit code {row['exit_code']}, {row['steps_lost']} steps lost")
            append_row(ROWS, row)
    PAGE.write_text(page_with(newest_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
