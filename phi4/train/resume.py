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
    """How checkpoints of a run are taken.

    Attributes:
        recipe: of the run that resumes.
        engine: built for it.
        source_hashes: manifest hash of every data source now.
        say: takes one line for the console.
        allow_change: whether schedule keys may differ from those of the checkpoint.
        roll_back: where the newest roll back resumed, if any; checkpoints that it undid are passed
            over.
        replicas: where a damaged checkpoint is taken from; None where there are none.
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
        CheckpointError: `run.init_from` or `data.continue_from` has no checkpoint, or that of the
            latter holds no ledger.
    """
    if recipe.run.init_from is not None:
        find_checkpoint(Path(recipe.run.init_from))
    if recipe.data.continue_from is None:
        return RunState()
    checkpoint = find_checkpoint(Path(recipe.data.continue_from))
    ledger = ledger_of(checkpoint.parent.parent, read_state(checkpoint))
    if ledger is None:
        raise CheckpointError(
            f"{checkpoint} has drawn no data, so data.continue_from has no ledger to continue; "
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
    replicas: Replicas | None = None,
) -> RunState:
    """Fill the engine from the newest checkpoint of the run that holds.

    After a roll back the data that it skipped stays skipped, whichever checkpoint is taken.

    Args:
        recipe: of the run that resumes.
        engine: built for it.
        allow_change: whether `--change` was given; then checkpoints that count as bad are tried
            again.
        say: takes one line for the console.
        source_hashes: manifest hash of every data source now.
        replicas: where a damaged checkpoint is taken from; None where there are none.

    Raises:
        ConfigError: the recipe does not continue the run.
        DataError: a source of the run has other content.
        CheckpointError: no checkpoint of the run can be used.
        DivergedError: all of them are bad.

    Collectives: those of `newest_loaded`; broadcasts of the candidates and of the roll back.
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
    """Fill the engine from the first candidate that holds; gives it and its state.

    One that is damaged is repaired from the replicas, if there are any. One that still is, or that
    cannot be loaded is named, and the next one is taken.

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
        "start anew"
    )


def _load(restoring: Restoring, checkpoint: Path) -> tuple[RunState, tuple[str, ...]]:
    """The state of a checkpoint that was loaded, and its files that no manifest lists."""
    engine, roll_back = restoring.engine, restoring.roll_back
    verified = _verified(restoring, checkpoint)
    written, saved = decided_by_writer(
        engine.platform, lambda: (read_recipe(checkpoint), read_state(checkpoint))
    )
    check_recipe(checkpoint, verified.manifest, written)
    if roll_back is not None and is_undone(saved, roll_back):
        raise CheckpointError(f"the roll back to step {roll_back.step} undid step {saved.step}")
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
    """Refuse sources that hold something else than when a checkpoint was saved.

    The ledger refuses them too, but only once the checkpoint is loaded.
    """
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if changed:
        raise DataError(
            f"data source {', '.join(changed)} holds other tokens than when the run was saved; "
            "restore its files, or give a source with other content another name"
        )
