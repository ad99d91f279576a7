"""Open a checkpoint of any layout as an engine without optimizer, in any layout."""

from collections.abc import Sequence
from pathlib import Path

from phi4.config import ParallelConfig, Recipe, changed_keys, check, with_overrides
from phi4.engine.agreement import decided_by_writer
from phi4.engine.checkpoint.loading import load_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.platform import Platform
from phi4.errors import ConfigError, Phi4Error
from phi4.rundir.manifest import check_recipe
from phi4.rundir.state import read_recipe


def recipe_of(checkpoint: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a checkpoint, on one process unless overrides set a layout.

    Raises:
        CheckpointError: the checkpoint has no recipe.
        ConfigError: an override is wrong, or would change the model.
        LayoutError: the recipe breaks a rule.
    """
    written = read_recipe(checkpoint)
    # Without training nothing runs in FP8, and the recipe's FP8 rules do not apply.
    precision = written.precision.model_copy(update={"fp8": "off"})
    single = written.model_copy(update={"parallel": ParallelConfig(), "precision": precision})
    recipe = with_overrides(single, overrides)
    # Weights can be read into another dtype; everything else in the model is fixed.
    foreign = changed_keys(single, recipe)["identity"].keys() - {"precision.dtype"}
    if foreign:
        raise ConfigError(
            f"{', '.join(sorted(foreign))} are fixed by {checkpoint}; remove these overrides"
        )
    check(recipe)
    return recipe


def open_checkpoint(recipe: Recipe, checkpoint: Path, platform: Platform) -> Engine:
    """Return an engine without optimizer with a checkpoint's weights, in the recipe's layout.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.

    Collectives: those of building the engine, of `verify_checkpoint` and of `load_checkpoint`.
    """
    engine = Engine(recipe, platform, trains=False, draws_weights=False)
    try:
        verified = verify_checkpoint(engine, checkpoint)
        decided_by_writer(
            platform,
            lambda: check_recipe(checkpoint, verified.manifest, read_recipe(checkpoint)),
        )
        load_checkpoint(engine, checkpoint, verified, optimizer=False)
    except Phi4Error:
        # All ranks refuse alike, and the caller may open another one.
        engine.close()
        raise
    return engine
