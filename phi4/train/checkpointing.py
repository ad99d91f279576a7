"""Saves during a run, and the search for the newest checkpoint that holds."""

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from phi4.config import Recipe, dump_toml, recipe_from_toml
from phi4.engine.checkpoint import (
    complete_checkpoints,
    find_checkpoint,
    host_memory_bytes,
    latest_checkpoint,
    load_checkpoint,
    optimizer_format,
    predicted_gather_bytes,
    read_checkpoint_file,
    save_checkpoint,
    verify_checkpoint,
)
from phi4.engine.engine import Engine
from phi4.errors import CheckpointError
from phi4.train.hooks import Hook, Progress
from phi4.train.state import RECIPE_FILE, STATE_FILE, RunState, with_changes

Say = Callable[[str], None]


def checkpoints_of(recipe: Recipe) -> Path:
    """`run.dir/checkpoints`."""
    return Path(recipe.run.dir) / "checkpoints"


class Checkpointer(Hook):
    """Saves every `checkpoint.every` steps and at the end.

    Args:
        recipe: the run.
        engine: what is saved.
        source_hashes: manifest hash of every data source.
        ranks_per_host: processes that share a machine's memory.
        say: takes one line for the console.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        source_hashes: Mapping[str, str],
        ranks_per_host: int,
        say: Say,
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._source_hashes = source_hashes
        self._gather_bytes = predicted_gather_bytes(engine, ranks_per_host)
        self._memory_bytes = host_memory_bytes(engine)
        self._say = say

    def act(self, progress: Progress) -> None:
        """Save when it is due. Collectives: those of `save_checkpoint`."""
        config = self._recipe.checkpoint
        if not progress.is_due(config.every):
            return
        resharding = config.reshardable_every
        form, reason = optimizer_format(
            config,
            self._gather_bytes,
            self._memory_bytes,
            reshardable_due=resharding > 0 and progress.step % resharding == 0,
        )
        path = save_checkpoint(
            self._engine,
            checkpoints_of(self._recipe),
            progress.step,
            form=form,
            keep=config.keep,
            files={RECIPE_FILE: dump_toml(self._recipe), STATE_FILE: progress.state.to_json()},
            data=self._source_hashes,
        )
        self._say(f"saved {path} (optimizer format {form}: {reason})")


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe a checkpoint was written under.

    Raises:
        CheckpointError: the file is missing.
    """
    text = read_checkpoint_file(checkpoint, RECIPE_FILE)
    return recipe_from_toml(text, where=str(checkpoint / RECIPE_FILE))


def read_state(checkpoint: Path) -> RunState:
    """The run state in a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    text = read_checkpoint_file(checkpoint, STATE_FILE)
    try:
        return RunState.from_json(text)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} is damaged: {error}") from None


def first_state(recipe: Recipe) -> RunState:
    """Where a run without a checkpoint begins: with the ledger of `data.continue_from`, if any.

    Raises:
        CheckpointError: there is no such checkpoint, or it holds no ledger.
    """
    if recipe.data.continue_from is None:
        return RunState()
    checkpoint = find_checkpoint(Path(recipe.data.continue_from))
    ledger = read_state(checkpoint).data
    if ledger is None:
        raise CheckpointError(
            f"{checkpoint} has drawn no data, so data.continue_from has no ledger to go on with; "
            "leave the key out"
        )
    return RunState(data=ledger, ledger_from=str(checkpoint))


def resume(recipe: Recipe, engine: Engine, *, allow_change: bool, say: Say) -> RunState:
    """Fill the engine from the newest checkpoint of the run that holds.

    A damaged checkpoint is named and the one before it taken.

    Raises:
        ConfigError: the recipe does not continue the run.
        CheckpointError: no checkpoint of the run can be used.

    Collectives: those of `load_checkpoint`.
    """
    root = checkpoints_of(recipe)
    newest = latest_checkpoint(root)
    # Every rank reads the same directory, so every rank takes the same path through this loop.
    candidates = [newest, *(p for p in reversed(complete_checkpoints(root)) if p != newest)]
    problems = []
    for checkpoint in candidates:
        try:
            manifest = verify_checkpoint(engine, checkpoint)
        except CheckpointError as error:
            say(f"cannot resume from {checkpoint}: {error}; trying the one before it")
            problems.append(str(error))
            continue
        written = read_recipe(checkpoint)
        state = with_changes(read_state(checkpoint), written, recipe, allow=allow_change)
        load_checkpoint(engine, checkpoint, manifest)
        say(f"resumed from {checkpoint} (step {state.step})")
        return state
    raise CheckpointError(
        f"no checkpoint under {root} can be used: {'; '.join(problems)}; use another run.dir to "
        "start anew"
    )
