"""A small sweep on disk, whose recipes are sound and whose data nobody reads."""

import json
from collections.abc import Callable
from pathlib import Path

from phi4.config import dump_toml, load_recipe
from phi4.launch.sweep import SweepFile, SweepRun, load_sweep, runs_of

BASE = Path(__file__).parents[2] / "examples" / "recipes" / "tiny_sweep.toml"

SWEEP = """
name = "small"
recipe = "{root}/base.toml"
directory = "{root}/sweep"
seeds = [1, 2]
[axes.learning_rate]
key = "optim.learning_rate"
values = [1e-3, 3e-3]
[scales.short]
run.steps = 4
[scales.long]
run.steps = 8
"""


def write_sweep(root: Path, *changes: tuple[str, str]) -> Path:
    """Write base.toml, and as sweep.toml the text above with parts replaced."""
    sources = "data.sources=[{name='a',path='a',weight=1},{name='b',path='b',weight=3}]"
    held_out = "data.held_out=[{name='held',path='c'}]"
    recipe = load_recipe(BASE, [sources, held_out, "optim.warmup=3"])
    (root / "base.toml").write_text(dump_toml(recipe))
    text = SWEEP
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = root / "sweep.toml"
    path.write_text(text.replace("{root}", str(root)))
    return path


def loaded(path: Path) -> tuple[SweepFile, list[SweepRun]]:
    """A sweep and its runs."""
    sweep = load_sweep(path)
    return sweep, runs_of(sweep, str(path))


def finish(run: SweepRun, loss: float) -> None:
    """Leave what a finished run leaves."""
    steps = run.recipe.run.steps
    checkpoint = run.run_dir / "checkpoints" / f"step_{steps:07d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    line = {"step": steps, "loss": loss, "held_out_loss": loss}
    (run.run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def finish_all(path: Path, loss_of: Callable[[SweepRun], float]) -> list[SweepRun]:
    """Finish all runs of a sweep."""
    runs = loaded(path)[1]
    for run in runs:
        finish(run, loss_of(run))
    return runs
