"""Runs of a sweep end, fail, are stopped and killed; none is run twice and none is forgotten.

The children are a program that keeps the contract of `phi4 train`: a checkpoint of the last step,
or an exit code.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4.config import dump_toml
from phi4.errors import ConfigError
from phi4.launch.reaper import processes_of
from phi4.launch.sweep import SweepRun, progress_of
from phi4.launch.sweep.progress import note
from tests.support.sweeps import loaded, write_sweep
from tests.support.waiting import LONG_SECONDS, wait_until

FAKE = r"""
import signal, sys, time, tomllib
from pathlib import Path
root = Path(__file__).parent
recipe = tomllib.loads(Path(sys.argv[2]).read_text())
run, steps = Path(recipe["run"]["dir"]), recipe["run"]["steps"]
plan = root / "plans" / run.name
words = plan.read_text().split() if plan.exists() else ["finish"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
run.mkdir(parents=True, exist_ok=True)
with (root / "starts").open("a") as file:
    file.write(run.name + "\n")
if words[0] == "wait":
    while not (root / "go").exists():
        time.sleep(0.01)
if words[0] == "exit":
    print("why it failed")
    sys.exit(int(words[1]))
checkpoint = run / "checkpoints" / f"step_{steps:07d}"
checkpoint.mkdir(parents=True)
(checkpoint / "manifest.json").write_text("{}")
"""

DRIVER = """
import sys
from pathlib import Path
from phi4.launch.sweep import load_sweep, progress_of, run_here, runs_of
root = Path(sys.argv[1])
runs = runs_of(load_sweep(root / "sweep.toml"), "sweep.toml")
progress = progress_of(runs, root / "sweep")
todo = [run for run in runs if not progress[run.name].has_ended]
command = (sys.executable, str(root / "fake.py"))
sys.exit(run_here(todo, root / "sweep", jobs=2, say=print, command=command))
"""


SIX_RUNS = (("[1, 2]", "[1, 2, 3]"), ("[scales.long]\nrun.steps = 8\n", ""))


class Sweeps:
    """`run_here` in a process of its own, which may be signalled and killed.

    Args:
        root: of the sweep.
    """

    def __init__(self, root: Path, runs: list[SweepRun]) -> None:
        self.root, self.runs = root, runs
        self.names = [run.name for run in runs]
        (root / "fake.py").write_text(FAKE)
        (root / "plans").mkdir()

    def plan(self, index: int, what: str) -> None:
        """What a run does: `finish`, `wait` for `go` and finish, or `exit CODE`."""
        (self.root / "plans" / self.names[index]).write_text(what)

    def begin(self) -> subprocess.Popen:
        """Start the runs that have not ended."""
        environment = {**os.environ, "SWEEP_TEST": str(self.root)}
        words = [sys.executable, "-c", DRIVER, str(self.root)]
        return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE)

    def finish(self) -> tuple[int, str]:
        """Exit code and output of a whole call."""
        process = self.begin()
        said, _ = process.communicate(timeout=LONG_SECONDS)
        return process.returncode, said

    @property
    def starts(self) -> Counter[str]:
        """How often each run was started."""
        path = self.root / "starts"
        return Counter(path.read_text().split() if path.exists() else [])

    @property
    def states(self) -> list[str]:
        """Of all runs, in order."""
        found = progress_of(self.runs, self.root / "sweep")
        return [found[name].status for name in self.names]

    @property
    def alive(self) -> list[int]:
        """Processes of a call and its children."""
        return processes_of(str(self.root), "SWEEP_TEST")


@pytest.fixture
def sweeps(tmp_path: Path) -> Iterator[Sweeps]:
    made = Sweeps(tmp_path, loaded(write_sweep(tmp_path, *SIX_RUNS))[1])
    yield made
    for pid in made.alive:
        os.kill(pid, signal.SIGKILL)


def test_a_failed_run_stops_no_other_and_is_all_that_runs_again(sweeps: Sweeps) -> None:
    sweeps.plan(1, "exit 1")
    sweeps.plan(2, "exit 6")
    code, said = sweeps.finish()
    assert code == 1
    assert sweeps.states == ["finished", "failed", "diverged", *["finished"] * 3]
    log = sweeps.root / "sweep" / "logs" / f"{sweeps.names[1]}.log"
    assert f"{sweeps.names[1]} failed with code 1" in said
    assert f"why it failed (see {log})" in said
    assert f"{sweeps.names[2]} diverged" in said
    sweeps.plan(1, "finish")
    assert sweeps.finish()[0] == 0
    assert sweeps.starts == {name: 2 if name == sweeps.names[1] else 1 for name in sweeps.names}
    assert sweeps.states == ["finished", "finished", "diverged", *["finished"] * 3]


def test_after_a_kill_the_same_command_runs_what_is_left(sweeps: Sweeps) -> None:
    for index in (2, 3):
        sweeps.plan(index, "wait")
    process = sweeps.begin()
    wait_until(lambda: sum(sweeps.starts.values()) == 4, "two finished runs and two that wait")
    process.kill()
    process.communicate(timeout=LONG_SECONDS)
    wait_until(lambda: not sweeps.alive, "the end of the killed sweep's children")
    assert sweeps.states == [*["finished"] * 2, *["started"] * 2, *["waiting"] * 2]
    (sweeps.root / "go").touch()
    assert sweeps.finish()[0] == 0
    assert sweeps.states == ["finished"] * 6
    assert [sweeps.starts[name] for name in sweeps.names] == [1, 1, 2, 2, 1, 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 5), (signal.SIGINT, 130)])
def test_a_signal_ends_all_children_and_starts_no_more(
    sweeps: Sweeps, number: int, code: int
) -> None:
    for index in (0, 1):
        sweeps.plan(index, "wait")
    # Whoever starts a sweep may have blocked the signal, and a process inherits that.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    process = sweeps.begin()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    wait_until(lambda: sum(sweeps.starts.values()) == 2, "two runs that wait")
    process.send_signal(number)
    said, _ = process.communicate(timeout=LONG_SECONDS)
    assert process.returncode == code
    assert "all runs are stopped; repeat the command to continue" in said
    assert sum(sweeps.starts.values()) == 2 and not sweeps.alive
    assert ("saved its step" in said) == (number == signal.SIGTERM)
    assert sweeps.states == [*["failed"] * 2, *["waiting"] * 4]


def test_a_removed_directory_is_a_run_to_do(sweeps: Sweeps) -> None:
    sweeps.runs[0].run_dir.mkdir(parents=True)
    note(sweeps.root / "sweep", sweeps.names[0], 4711)
    assert sweeps.states[0] == "started"
    note(sweeps.root / "sweep", sweeps.names[0], 4711, exit_code=6)
    assert sweeps.states[0] == "diverged"
    sweeps.runs[0].run_dir.rmdir()
    assert sweeps.states[0] == "waiting"


def test_runs_of_another_recipe_are_refused(sweeps: Sweeps, tmp_path: Path) -> None:
    run_dir = sweeps.runs[0].run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(dump_toml(sweeps.runs[0].recipe))
    assert sweeps.states[0] == "started"
    changed = loaded(
        write_sweep(tmp_path, *SIX_RUNS, ("run.steps = 4", "run.steps = 4\noptim.warmup = 1"))
    )[1]
    with pytest.raises(ConfigError, match=r"trained with another optim\.warmup .* now 1\)"):
        progress_of(changed, sweeps.root / "sweep")
