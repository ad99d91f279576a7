"""Saves during a run, and the search for the newest checkpoint that holds."""

from collections.abc import Callable, Mapping
from pathlib import Path

from phi4.config import Recipe, dump_toml
from phi4.engine.agreement import decided_by_writer
from phi4.engine.checkpoint import (
    checkpoints_newest_first,
    host_memory_bytes,
    load_checkpoint,
    optimizer_format,
    predicted_gather_bytes,
    save_checkpoint,
    verify_checkpoint,
)
from phi4.engine.engine import Engine
from phi4.errors import CheckpointError, DataError, DiskFullError, PlatformError
from phi4.rundir.checkpoints import checkpoints_dir, find_checkpoint
from phi4.rundir.manifest import check_recipe
from phi4.rundir.names import RECIPE_FILE, STATE_FILE
from phi4.rundir.state import RunState, read_recipe, read_state
from phi4.train.changes import with_changes
from phi4.train.hooks import Hook, Progress

Say = Callable[[str], None]
_RETRIES_PER_INTERVAL = 10
"""How often a save that failed is tried again until the next one is due anyway."""


class Checkpointer(Hook):
    """Saves every `checkpoint.every` steps and at the end.

    A save that the disk refuses does not end the run: training goes on from memory, and the save is
    tried again soon. Only the last step's has to succeed.

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
        self._retry_step: int | None = None
        self._owes_reshardable = False

    def act(self, progress: Progress) -> None:
        """Save when it is due or owed.

        Raises:
            DiskFullError, PlatformError: the last step cannot be saved.

        Collectives: those of `save_checkpoint`.
        """
        config, step = self._recipe.checkpoint, progress.step
        resharding = config.reshardable_every
        if resharding > 0 and step % resharding == 0 and progress.is_due(config.every):
            self._owes_reshardable = True
        if not progress.is_due(config.every) and step != self._retry_step:
            return
        try:
            self._save(progress)
        except (DiskFullError, PlatformError) as error:
            if progress.is_last:
                raise
            self._retry_step = step + max(1, config.every // _RETRIES_PER_INTERVAL)
            self._say(
                f"step {step} is not saved: {error}; training goes on and tries again after step "
                f"{self._retry_step}"
            )
        else:
            self._retry_step, self._owes_reshardable = None, False

    def _save(self, progress: Progress) -> None:
        config = self._recipe.checkpoint
        form, reason = optimizer_format(
            config,
            self._gather_bytes,
            self._memory_bytes,
            reshardable_due=self._owes_reshardable,
        )
        path = save_checkpoint(
            self._engine,
            checkpoints_dir(self._recipe.run.dir),
            progress.step,
            form=form,
            keep=config.keep,
            files={RECIPE_FILE: dump_toml(self._recipe), STATE_FILE: progress.state.to_json()},
            data=self._source_hashes,
        )
        self._say(f"saved {path} (optimizer format {form}: {reason})")


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


def resume(
    recipe: Recipe,
    engine: Engine,
    *,
    allow_change: bool,
    say: Say,
    source_hashes: Mapping[str, str],
) -> RunState:
    """Fill the engine from the newest checkpoint of the run that holds.

    One that is damaged or cannot be loaded is named, and the one before it is taken.

    Args:
        recipe: of the run that goes on.
        engine: built for it.
        allow_change: whether `--change` was given.
        say: takes one line for the console.
        source_hashes: manifest hash of every data source now.

    Raises:
        ConfigError: the recipe does not continue the run.
        DataError: a source of the run has other content.
        CheckpointError: no checkpoint of the run can be used.

    Collectives: those of `load_checkpoint`; broadcasts of the candidates and of each one's state.
    """
    root, platform = checkpoints_dir(recipe.run.dir), engine.platform
    problems = []
    for checkpoint in checkpoints_newest_first(platform, root):
        try:
            verified = verify_checkpoint(engine, checkpoint)
            written, saved = decided_by_writer(
                platform, lambda path=checkpoint: (read_recipe(path), read_state(path))
            )
            check_recipe(checkpoint, verified.manifest, written)
            state = with_changes(saved, written, recipe, allow=allow_change, say=say)
            _check_data(verified.manifest.data, source_hashes)
            load_checkpoint(engine, checkpoint, verified)
        except CheckpointError as error:
            say(f"cannot resume from {checkpoint}: {error}; trying the one before it")
            problems.append(str(error))
            continue
        if verified.unlisted:
            names = ", ".join(verified.unlisted)
            say(f"{checkpoint} holds {names}, not listed in its manifest and not read")
        say(f"resumed from {checkpoint} (step {state.step})")
        return state
    raise CheckpointError(
        f"no checkpoint under {root} can be used: {'; '.join(problems)}; use another run.dir to "
        "start anew"
    )


def _check_data(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse sources that hold something else than when a checkpoint was saved.

    The ledger refuses them too, but only once the checkpoint is loaded.
    """
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if changed:
        raise DataError(
            f"data source {', '.join(changed)} holds other tokens than when the run was saved; "
            "restore its files, or give a source with other content another name"
        )
