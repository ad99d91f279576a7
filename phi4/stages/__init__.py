"""Stages: what a batch is and what its loss is; nothing about parallelism.

`run.stage` of a recipe names one of STAGES; the module of that name defines it as `STAGE`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from phi4.config import Recipe
from phi4.errors import ConfigError

if TYPE_CHECKING:
    from phi4.stages.stage import Stage

STAGES = {
    "pretrain": "Next-token prediction over a blend of sources.",
    "midtrain": "Pretraining continued from trained weights, with longer rows.",
    "sft": "Next-token prediction over the assistant's tokens of conversations.",
    "dpo": "Direct preference optimisation over pairs of answers and pivotal tokens.",
}
"""Every stage with a line about it. No stage is imported before a recipe asks for it: that would
import torch and megatron-core."""

STAGES_WITH_GATE = ("dpo",)
"""Stages with `phi4.stages.gate` among their hooks."""


def require_stage(recipe: Recipe) -> None:
    """Refuse a recipe whose stage does not exist.

    Raises:
        ConfigError: names the stages there are.
    """
    if recipe.run.stage not in STAGES:
        raise ConfigError(
            f"run.stage={recipe.run.stage!r} is not a stage; use one of {', '.join(STAGES)}"
        )


def require_gate(recipe: Recipe) -> None:
    """Refuse a recipe whose stage checks nothing before its first step.

    Raises:
        ConfigError: names the stages that do.
    """
    if recipe.run.stage not in STAGES_WITH_GATE:
        raise ConfigError(
            f"--no-gate skips the start gate, and run.stage={recipe.run.stage} has none; leave it "
            f"out ({', '.join(STAGES_WITH_GATE)} has one)"
        )


def stage_of(recipe: Recipe) -> "Stage":
    """The stage that a recipe trains.

    Raises:
        ConfigError: as `require_stage`.
    """
    require_stage(recipe)
    return import_module(f"phi4.stages.{recipe.run.stage}").STAGE
