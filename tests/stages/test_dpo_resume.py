"""A DPO run that is killed goes on, to the same bits and in another layout."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from phi4.config import dump_toml, recipe_from_toml
from phi4.data.stream.references import open_references
from phi4.engine.checkpoint import open_checkpoint
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir, find_checkpoint
from phi4.rundir.names import CONFIG_FILE, GATE_FILE, METRICS_FILE, REFERENCE_FILE
from phi4.rundir.step_log import read_metrics
from phi4.verify.parity import LOSS_TOLERANCE, PARAMETER_TOLERANCE
from tests.support import preference_runs
from tests.support.metrics_page import unexplained
from tests.support.preference_runs import recipe_of
from tests.support.ranks import RankPool, pool_fixture
from tests.support.runs import command, train
from tests.support.waiting import LONG_SECONDS

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLED_AT = 20, 5, 13
RUN = (
    *(f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=9"),
    *("optim.learning_rate=1e-3", "optim.warmup=5"),
)
KILL = f"""
import os, signal
from phi4.rundir.step_log import StepLog
log = StepLog.log
def killed(self, step, metrics):
    if step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, step, metrics)
StepLog.log = killed
"""
"""What the killed process imports first: it dies between a step and its record."""
OF_THE_MACHINE = re.compile(
    "unix_seconds|attempt|goodput|eta_seconds|step_seconds|tokens_per_second.*|model_tflops.*"
    "|(seconds|memory)/.*"
)
OF_SAVES = ("durable_step", "save_seconds", "save_stall_seconds")
"""Of the save before a step, which the step after a resumption does not tell again."""
OTHER_LAYOUTS = {
    "tp2+sp": ("parallel.tensor=2", "parallel.sequence=true"),
    "pp2": ("parallel.pipeline=2",),
}


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    """A start, its cache, and `straight`: a run in one go."""
    directory = tmp_path_factory.mktemp("resume")
    preference_runs.write_files(directory)
    pool.run(preference_runs.start, directory)
    assert pool.run(preference_runs.cache, directory) == ["", ""]
    assert pool.run(preference_runs.run, directory, (*RUN, "run.dir=straight")) == ["", ""]
    return directory


def test_run_that_is_killed_goes_on_to_the_same_bits(root: Path, pool: RankPool) -> None:
    (root / "recipe.toml").write_text(dump_toml(recipe_of(*RUN, "run.dir=killed")))
    faults = root / "faults"
    faults.mkdir()
    (faults / "sitecustomize.py").write_text(KILL)
    path = f"{faults}:{os.environ.get('PYTHONPATH', '')}"
    killed = subprocess.run(
        command(),
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        timeout=LONG_SECONDS,
        check=False,
    )
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr
    assert list(records(root / "killed")) == list(range(1, KILLED_AT))
    result = train(root)
    assert result.returncode == 0, result.stderr
    assert checkpoint_name(KILLED_AT // EVERY * EVERY) in result.stdout
    assert records(root / "killed") == records(root / "straight")
    (found, straight), _ = pool.run(final_weights, root, ("killed", "straight"))
    assert all(torch.equal(found[name], tensor) for name, tensor in straight.items())


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_another_layout_goes_on_from_the_middle(layout: str, root: Path, pool: RankPool) -> None:
    middle = checkpoint_name(STEPS // 2)
    target = root / layout
    shutil.copytree(checkpoints_dir(root / "straight") / middle, checkpoints_dir(target) / middle)
    shutil.copy(root / "straight" / REFERENCE_FILE, target)
    overrides = (*RUN, f"run.dir={layout}", *OTHER_LAYOUTS[layout])
    assert pool.run(preference_runs.run, root, overrides) == ["", ""]
    found, straight = records(target), records(root / "straight")
    assert list(found) == list(range(STEPS // 2 + 1, STEPS + 1))
    for step, record in found.items():
        assert record["loss"] == pytest.approx(straight[step]["loss"], rel=LOSS_TOLERANCE)
    (weights, truth), _ = pool.run(final_weights, root, (layout, "straight"))
    for name, tensor in truth.items():
        error = float((weights[name] - tensor).norm() / tensor.norm())
        assert error <= PARAMETER_TOLERANCE, f"{name} is off by {error:.1e}"


def test_run_records_what_it_started_from(root: Path) -> None:
    run_dir = root / "straight"
    recipe = recipe_from_toml((run_dir / CONFIG_FILE).read_text(), where=CONFIG_FILE)
    assert recipe.run.init_from == "start"
    reference = json.loads((run_dir / REFERENCE_FILE).read_bytes())
    cached = open_references(root / "cache").manifest
    assert reference["weights"] == cached.weights and len(cached.weights) > 10
    assert Path(reference["checkpoint"]) == Path("start/checkpoints") / checkpoint_name(0)
    gate = json.loads((run_dir / GATE_FILE).read_bytes())
    assert gate["outcome"] == "passed" and gate["starts_from_reference"]


def records(run_dir: Path) -> dict[int, dict[str, float]]:
    """What the steps measured, without what depends on the machine and on saves."""
    lines = read_metrics(run_dir / METRICS_FILE)
    assert unexplained(lines) == []
    return {
        record["step"]: {
            key: value
            for key, value in record.items()
            if key not in OF_SAVES and not OF_THE_MACHINE.fullmatch(key)
        }
        for record in lines
    }


# What follows runs in the ranks.


def final_weights(
    rank: int, world_size: int, root: Path, run_dirs: tuple[str, ...]
) -> list[dict[str, torch.Tensor]]:
    """Of the newest checkpoint of each run, on one process."""
    found = []
    recipe = recipe_of()
    with preference_runs.joined(rank, world_size, root, recipe) as platform:
        for run_dir in run_dirs if platform else ():
            engine = open_checkpoint(recipe, find_checkpoint(Path(run_dir)), platform)
            found.append({name: x.clone() for name, x in engine.whole_parameters()})
            engine.close()
    return found
