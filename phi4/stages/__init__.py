"""Training stages: each defines what a batch is and its loss, independent of parallelism.

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
    "sft": "Next-token prediction on the assistant's tokens of conversations.",
    "dpo": "Direct preference optimisation over pairs of answers and pivotal tokens.",
}
"""Every stage with a one-line description. A stage is imported only when a recipe selects it,
because the import loads torch and megatron-core."""

STAGES_WITH_GATE = ("dpo",)
"""Stages that have `phi4.stages.gate` among their hooks."""


def require_stage(recipe: Recipe) -> None:
    """Raise an error for a recipe whose stage does not exist.

    Raises:
        ConfigError: lists the stages.
    """
    if recipe.run.stage not in STAGES:
        raise ConfigError(
            f"run.stage={recipe.run.stage!r} is not a stage; use one of {', '.join(STAGES)}"
        )


def require_gate(recipe: Recipe) -> None:
    """Raise an error for a recipe whose stage has no start gate.

    Raises:
        ConfigError: lists the stages that have one.
    """
    if recipe.run.stage not in STAGES_WITH_GATE:
        raise ConfigError(
            f"--no-gate skips the start gate, but run.stage={recipe.run.stage} has none; omit "
            f"--no-gate (stages with a gate: {', '.join(STAGES_WITH_GATE)})"
        )


def stage_of(recipe: Recipe) -> "Stage":
    """Return the stage that a recipe trains.

    Raises:
        ConfigError: as `require_stage`.
    """
    require_stage(recipe)
    return import_module(f"phi4.stages.{recipe.run.stage}").STAGE
