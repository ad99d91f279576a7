"""A sweep of real runs, from its file to its table."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi4.launch.sweep import SweepRun
from tests.support.in_process import write_recipe
from tests.support.sweeps import loaded
from tests.support.waiting import LONG_SECONDS

REAL = """
name = "real"
recipe = "recipe.toml"
directory = "sweep"
seeds = [1]
metrics = ["loss"]
parallel_runs = 2
[axes.learning_rate]
key = "optim.learning_rate"
values = [1e-3, 1e30]
"""


@pytest.mark.slow
def test_a_sweep_trains_and_says_what_it_found(tmp_path: Path) -> None:
    """Real runs: one learns, one's weights overflow, which is a result and no failure."""
    write_recipe(tmp_path, "run.steps=8", "optim.warmup=0", "reliability.max_roll_backs=0")
    (tmp_path / "sweep.toml").write_text(REAL)

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "phi4", "sweep", *words]
        return subprocess.run(
            command, cwd=tmp_path, text=True, capture_output=True, timeout=LONG_SECONDS
        )

    done = run("run", "sweep.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    [good, bad] = loaded_in(tmp_path)
    assert f"{good.name} finished in" in done.stdout
    assert f"{bad.name} diverged after" in done.stdout
    config = (tmp_path / good.run_dir / "config.toml").read_text()
    assert 'sweep = "real"' in config
    cells = json.loads(run("table", "sweep.toml", "--json").stdout)["cells"]
    assert [cell["num_diverged"] for cell in cells] == [0, 1]
    assert 0 < cells[0]["mean"]["mean"] < 10 and cells[1]["mean"]["mean"] is None
    again = run("run", "sweep.toml")
    assert again.returncode == 0 and "2 have ended, 0 to do" in again.stderr


def loaded_in(directory: Path) -> list[SweepRun]:
    """The runs of its sweep.toml, whose paths are relative to it."""
    with contextlib.chdir(directory):
        return loaded(Path("sweep.toml"))[1]
