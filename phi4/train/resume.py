"""Where a run resumes: the search for the newest valid checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4.config import Recipe
from phi4.engine.agreement import decided_by_writer
from phi4.engine.checkpoint import (
    Replicas,
    VerifiedCheckpoint,
    checkpoints_newest_first,
    load_checkpoint,
    verify_checkpoint,
)
from phi4.engine.engine import Engine
from phi4.errors import CheckpointError, DataError
from phi4.rundir.bad_checkpoints import forget_bad
from phi4.rundir.checkpoints import checkpoints_dir, find_checkpoint
from phi4.rundir.manifest import check_recipe
from phi4.rundir.roll_back import continued_behind, is_undone, ledger_of, read_roll_back
from phi4.rundir.state import RunState, read_recipe, read_state
from phi4.train.changes import with_changes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Restoring:
    """What it takes to restore a run from one of its checkpoints.

    Attributes:
        recipe: recipe of the run that resumes.
        engine: the engine, built for that recipe.
        source_hashes: present manifest hash of every data source.
        say: prints one line to the console.
        allow_change: whether schedule keys may differ from those of the checkpoint.
        roll_back: the state that the newest rollback returned to, if any; checkpoints of steps that
            it undid are skipped.
        replicas: repair a damaged checkpoint; None if there are none.
    """

    recipe: Recipe
    engine: Engine
    source_hashes: Mapping[str, str]
    say: Say
    allow_change: bool
    roll_back: RunState | None = None
    replicas: Replicas | None = None


def first_state(recipe: Recipe) -> RunState:
    """The state of a run without a checkpoint: with the ledger of `data.continue_from`, if any.

    Raises:
        CheckpointError: `run.init_from` or `data.continue_from` has no checkpoint, or the latter's
            checkpoint has no ledger.
    """
    if recipe.run.init_from is not None:
        find_checkpoint(Path(recipe.run.init_from))
    if recipe.data.continue_from is None:
        return RunState()
    checkpoint = find_checkpoint(Path(recipe.data.continue_from))
    ledger = ledger_of(checkpoint.parent.parent, read_state(checkpoint))
    if ledger is None:
        raise CheckpointError(
            f"{checkpoint} has consumed no data, so data.continue_from has no ledger to continue; "
            "remove the key"
        )
    return RunState(data=ledger, ledger_from=str(checkpoint))


def resume(
    recipe: Recipe,
    engine: Engine,
    *,
    allow_change: bool,
    say: Say,
    source_hashes: Mapping[str, str],
    replicas: Replicas | None = None,
) -> RunState:
    """Restore the engine from the newest valid checkpoint of the run; returns the run's state.

    Data that a rollback skipped stays skipped, whichever checkpoint is loaded.

    Args:
        recipe: recipe of the run that resumes.
        engine: the engine, built for that recipe.
        allow_change: whether `--change` was given; then checkpoints that were noted as bad are
            tried again.
        say: prints one line to the console.
        source_hashes: present manifest hash of every data source.
        replicas: repair a damaged checkpoint; None if there are none.

    Raises:
        ConfigError: the recipe does not continue the run.
        DataError: a source of the run has other content.
        CheckpointError: no checkpoint of the run can be used.
        DivergedError: all of them are bad.

    Collectives: those of `newest_loaded`; broadcasts of the candidates and of the rollback.
    """
    root, platform, run_dir = checkpoints_dir(recipe.run.dir), engine.platform, Path(recipe.run.dir)
    roll_back = decided_by_writer(platform, lambda: read_roll_back(run_dir))
    if allow_change:
        decided_by_writer(platform, lambda: forget_bad(root))
    restoring = Restoring(recipe, engine, source_hashes, say, allow_change, roll_back, replicas)
    checkpoint, state = newest_loaded(restoring, checkpoints_newest_first(platform, root))
    if roll_back is not None and state.step <= roll_back.step:
        row_units = recipe.data.sequence_length // recipe.data.unit_tokens
        state = continued_behind(state, roll_back, row_units=row_units)
        say(f"data: skipping {state.skips[-1].rows:,} rows ({state.skips[-1].reason})")
    if state.step < recipe.run.steps:
        say(f"resumed from {checkpoint} (step {state.step})")
    return state


def newest_loaded(restoring: Restoring, candidates: Sequence[Path]) -> tuple[Path, RunState]:
    """Restore the engine from the first valid candidate; returns that checkpoint and its state.

    A damaged checkpoint is repaired from the replicas, if there are any. One that stays damaged, or
    that cannot be loaded, is reported, and the next one is tried.

    Raises:
        ConfigError: the recipe does not continue the run.
        DataError: a source of the run has other content.
        CheckpointError: no candidate can be used; the engine's weights are then undefined.

    Collectives: those of `load_checkpoint`, and of `Replicas.repair` for a damaged one; a broadcast
    of each one's recipe and state.
    """
    say, problems = restoring.say, []
    for checkpoint in candidates:
        try:
            state, unlisted = _load(restoring, checkpoint)
        except CheckpointError as error:
            say(f"cannot resume from {checkpoint}: {error}; trying the one before it")
            problems.append(str(error))
            continue
        if unlisted:
            names = ", ".join(unlisted)
            say(f"{checkpoint} holds {names}, not listed in its manifest and not read")
        return checkpoint, state
    root = checkpoints_dir(restoring.recipe.run.dir)
    raise CheckpointError(
        f"no checkpoint under {root} can be used: {'; '.join(problems)}; use another run.dir to "
        "start from scratch"
    )


def _load(restoring: Restoring, checkpoint: Path) -> tuple[RunState, tuple[str, ...]]:
    """Load a checkpoint; returns its state, and its files that no manifest lists."""
    engine, roll_back = restoring.engine, restoring.roll_back
    verified = _verified(restoring, checkpoint)
    written, saved = decided_by_writer(
        engine.platform, lambda: (read_recipe(checkpoint), read_state(checkpoint))
    )
    check_recipe(checkpoint, verified.manifest, written)
    if roll_back is not None and is_undone(saved, roll_back):
        raise CheckpointError(f"the rollback to step {roll_back.step} undid step {saved.step}")
    state = with_changes(
        saved, written, restoring.recipe, allow=restoring.allow_change, say=restoring.say
    )
    _check_data(verified.manifest.data, restoring.source_hashes)
    load_checkpoint(engine, checkpoint, verified)
    return state, verified.unlisted


def _verified(restoring: Restoring, checkpoint: Path) -> VerifiedCheckpoint:
    try:
        return verify_checkpoint(restoring.engine, checkpoint)
    except CheckpointError as error:
        if restoring.replicas is None:
            raise
        restoring.say(f"{checkpoint} is damaged: {error}")
        if not restoring.replicas.repair(checkpoint):
            raise
    return verify_checkpoint(restoring.engine, checkpoint)


def _check_data(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse sources whose content has changed since a checkpoint was saved.

    The ledger refuses them too, but only after the checkpoint is loaded.
    """
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if changed:
        raise DataError(
            f"data source {', '.join(changed)} holds other tokens than when the run was saved; "
            "restore its files, or give a source with other content another name"
        )
