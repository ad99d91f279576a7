"""Every script of examples/ runs and teaches its model something."""

import runpy
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks

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


def test_every_script_is_run_here() -> None:
    run_here = {"train_loop.py", "custom_objective.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == run_here
