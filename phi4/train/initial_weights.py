"""Initial weights from another run's checkpoint, instead of random ones.

Only the weights are loaded: the new run has its own optimizer state and data order.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from phi4.config import Recipe
from phi4.engine.agreement import decided_by_writer
from phi4.engine.checkpoint import find_checkpoint_together, load_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.errors import CheckpointError
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.state import RunState, read_recipe

Say = Callable[[str], None]


def with_initial_weights(recipe: Recipe, engine: Engine, state: RunState, say: Say) -> RunState:
    """Load the initial weights of a new run, if the recipe names any; returns the run's state."""
    if recipe.run.init_from is not None:
        checkpoint = initialise_from(engine, Path(recipe.run.init_from), say)
        digest = decided_by_writer(engine.platform, partial(manifest_hash, checkpoint))
        state = msgspec.structs.replace(
            state, weights_from=str(checkpoint), weights_manifest_sha256=digest
        )
    if state.ledger_from:
        say(f"data: continuing the ledger of {state.ledger_from}")
    return state


def initialise_from(engine: Engine, place: Path, say: Say) -> Path:
    """Load the weights, and nothing else, of a checkpoint whose model has the same shape.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: damaged, or its model has another shape.
        PlatformError: a rank does not see the checkpoint.

    Collectives: broadcasts of what rank 0 found, an all-gather of which ranks see it, and those of
    `load_checkpoint`.
    """
    checkpoint = find_checkpoint_together(engine.platform, place)
    verified = verify_checkpoint(engine, checkpoint)
    shape = decided_by_writer(engine.platform, lambda: read_recipe(checkpoint).model)
    asked = engine.recipe.model
    # RoPE has no weights, so its base and the longest sequence may change: midtraining does that.
    free = {"rope_theta": 0.0, "max_position_embeddings": 0, "init_std": 0.0}
    if shape.model_copy(update=free) != asked.model_copy(update=free):
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape than the recipe's; use the [model] "
            "table of its recipe.toml"
        )
    load_checkpoint(engine, checkpoint, verified, optimizer=False)
    say(f"initial weights from {checkpoint}")
    return checkpoint
