"""Compare a run that stops and resumes with an uninterrupted one in the same layout, bit by bit.

The uninterrupted run saves half way; a second run directory starts from that checkpoint, and new
processes train it to the same last step.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from phi4.config import Recipe, with_overrides
from phi4.errors import ConfigError
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics

COMPARED = ("loss", "grad_norm", "learning_rate", "consumed_tokens")


@dataclass(frozen=True)
class ResumeReport:
    """Records of both runs for the steps after the resume."""

    first_step: int
    last_step: int
    differences: tuple[str, ...]
    """`step 12: loss 5.1 straight, 5.2 resumed`; empty when bit-identical."""


def straight_recipe(recipe: Recipe, steps: int, work_dir: Path) -> Recipe:
    """Return the recipe for `steps` uninterrupted steps, saving half way.

    Raises:
        ConfigError: fewer than two steps.
    """
    if steps < 2:
        raise ConfigError(f"--steps {steps} cannot be halved; use at least 2")
    return with_overrides(
        recipe,
        [
            f"run.dir={work_dir / 'straight'}",
            f"run.steps={steps}",
            f"checkpoint.every={steps // 2}",
            "checkpoint.keep=3",
            "tracking.mlflow=false",
        ],
    )


def resumed_recipe(straight: Recipe, work_dir: Path) -> Recipe:
    """Return the recipe of the run that resumes half way; create its directory with the
    checkpoint."""
    middle = checkpoint_name(straight.checkpoint.every)
    run_dir = work_dir / "resumed"
    shutil.copytree(checkpoints_dir(straight.run.dir) / middle, checkpoints_dir(run_dir) / middle)
    return with_overrides(straight, [f"run.dir={run_dir}"])


def compare_runs(straight: Recipe, resumed: Recipe) -> ResumeReport:
    """Compare the records of the steps after the resume."""
    before = {m["step"]: m for m in read_metrics(Path(straight.run.dir) / METRICS_FILE)}
    after = {m["step"]: m for m in read_metrics(Path(resumed.run.dir) / METRICS_FILE)}
    steps = range(straight.checkpoint.every + 1, straight.run.steps + 1)
    differences = tuple(
        f"step {step}: {key} {before[step][key]!r} straight, {after[step][key]!r} resumed"
        for step in steps
        for key in COMPARED
        if before[step][key] != after[step][key]
    )
    return ResumeReport(steps[0], steps[-1], differences)
