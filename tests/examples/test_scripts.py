"""Every script of examples/ runs and teaches its model something."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from phi4.cli.demo import ALL_STEPS
from tests.support.ranks import run_ranks
from tests.support.waiting import LONG_SECONDS

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(rank: int, world_size: int, script: str) -> list[float]:
    return runpy.run_path(str(EXAMPLES / script))["main"]()


@pytest.mark.parametrize(
    ("script", "gain"), [("train_loop.py", -2.0), ("custom_objective.py", 0.3)]
)
def test_script_learns(script: str, gain: float) -> None:
    """gain: how the script's figure changes at least, a loss downward and an accuracy upward."""
    [figures] = run_ranks(1, run, script)
    change = figures[-1] - figures[0]
    assert change <= gain if gain < 0 else change >= gain


@pytest.mark.slow
def test_post_training_goes_from_the_corpus_to_an_answer(tmp_path: Path) -> None:
    """One process and two steps per stage; the layouts have tests of their own."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/phi4").symlink_to(Path(sys.executable).parent / "phi4")
    short = ["run.steps=2", "parallel.tensor=1", "parallel.pipeline=1", "parallel.context=1"]
    command = [str(tmp_path / "examples/post_training.sh"), *short, "parallel.sequence=false"]
    done = subprocess.run(command, capture_output=True, timeout=LONG_SECONDS)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, said
    origins = {"run": "", "sft": "run", "dpo_pivotal": "sft", "dpo_second": "dpo_pivotal"}
    for name, origin in origins.items():
        assert f"saved runs/demo/{name}/checkpoints/step_0000002" in said
        assert not origin or f"initial weights from runs/demo/{origin}/checkpoints/step_" in said
    assert said.count("start gate: passed") == 2


def test_post_training_takes_the_model_of_a_finished_demo() -> None:
    script = (EXAMPLES / "post_training.sh").read_text()
    assert f"runs/demo/run/checkpoints/step_{ALL_STEPS:07d} ]" in script


def test_every_script_is_run_here() -> None:
    run_here = {"train_loop.py", "custom_objective.py", "post_training.sh"}
    assert {path.name for path in EXAMPLES.glob("*.*")} == run_here
