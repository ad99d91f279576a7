"""A run from its recipe to its end: directory, engine, resume, loop, trackers.

Everything that can be wrong is checked before anything is written over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from phi4.config import Recipe, dump_toml
from phi4.data.vocabulary.tokenizer import TokenizerFacts, load_tokenizer
from phi4.engine.agreement import decided_by_writer, done_by_all
from phi4.engine.checkpoint import find_checkpoint_together, load_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.errors import CheckpointError, OwnershipError, TokenizerError
from phi4.rundir import Lease
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint
from phi4.rundir.names import CONFIG_FILE
from phi4.rundir.state import RunState, read_recipe
from phi4.track import Trackers, open_trackers, recipe_params
from phi4.train.checkpointing import (
    Checkpointer,
    first_state,
    resume,
)
from phi4.train.evaluation import HeldOutLoss
from phi4.train.hooks import Hook, Meter
from phi4.train.ledger_record import LedgerRecord
from phi4.train.loop import train
from phi4.train.ownership import Ownership, owned_run_dir
from phi4.train.sources import open_loader, open_sources, opened_writer_first

Say = Callable[[str], None]


def run_training(
    recipe: Recipe,
    platform: Platform,
    objective: Objective,
    *,
    allow_change: bool,
    attempt: int | None = None,
    job: str = "",
    hooks: Sequence[Hook] = (),
) -> RunState:
    """Train a recipe to its last step, from its newest checkpoint where there is one.

    Args:
        recipe: checked against the rules.
        platform: this process.
        objective: the stage's loss.
        allow_change: schedule keys may differ from the run's.
        attempt: the attempt whose lease on run.dir the launcher holds; None takes one here.
        job: Slurm job id, or empty.
        hooks: called after the run's own.

    Raises:
        OwnershipError: another run owns run.dir, or took it over.
        ConfigError: the recipe does not continue the run in run.dir.
        DataError: a source or the tokenizer is missing or wrong.
        CheckpointError: no checkpoint of the run can be used.
        PlatformError: a rank does not see the files that rank 0 sees; names the rank.

    Collectives: those of owning run.dir, of building the engine, of loading, of every step and
    hook.
    """
    say = print_line if platform.is_writer else _silent
    run_dir = Path(recipe.run.dir)
    with owned_run_dir(run_dir, platform, attempt=attempt, job=job, say=say) as lease:
        return _run(recipe, platform, objective, lease, allow_change, say, hooks)


def _run(
    recipe: Recipe,
    platform: Platform,
    objective: Objective,
    lease: Lease | None,
    allow_change: bool,
    say: Say,
    hooks: Sequence[Hook],
) -> RunState:
    tokenizer = done_by_all(platform, partial(check_tokenizer, recipe))
    state = decided_by_writer(platform, partial(_fresh_state, recipe))
    # Before anything is built: a missing or foreign source is an error at once.
    loader = open_sources(recipe, tokenizer, state, platform)
    draws_weights = state is not None and recipe.run.init_from is None
    engine = Engine(recipe, platform, draws_weights=draws_weights)
    choices = (choice.describe() for choice in engine.choices)
    for line in (platform.describe(), engine.layout.describe(), *choices, *loader.notes):
        say(line)
    if state is None:
        state = resume(
            recipe,
            engine,
            allow_change=allow_change,
            say=say,
            source_hashes=loader.source_hashes(),
        )
        loader = done_by_all(platform, partial(open_loader, recipe, tokenizer, state))
    else:
        _begin(recipe, engine, state, say)
    held_out = opened_writer_first(
        platform, partial(HeldOutLoss, recipe, engine, objective, tokenizer)
    )
    with _recorded(recipe, platform, lease, state.step, say) as (trackers, ledger):
        own_hooks = [
            Ownership(platform, lease, recipe.checkpoint.every),
            Meter(),
            held_out,
            *ledger,
            Checkpointer(recipe, engine, loader.source_hashes(), platform.ranks_per_host, say),
        ]
        state = train(
            recipe, engine, loader, objective, [*own_hooks, *hooks], state, record=trackers.log
        )
    engine.close()
    return state


def _fresh_state(recipe: Recipe) -> RunState | None:
    """Where the run begins; None where it has a checkpoint to resume from."""
    if latest_checkpoint(checkpoints_dir(recipe.run.dir)) is not None:
        return None
    return first_state(recipe)


def _begin(recipe: Recipe, engine: Engine, state: RunState, say: Say) -> None:
    if recipe.run.init_from is not None:
        initialise_from(engine, Path(recipe.run.init_from), say)
    if state.ledger_from:
        say(f"data: continuing the ledger of {state.ledger_from}")


def initialise_from(engine: Engine, place: Path, say: Say) -> None:
    """Take the weights, and nothing else, of a checkpoint of the same shape.

    Raises:
        CheckpointError: damaged, or its model has another shape.
        PlatformError: a rank does not see the checkpoint.

    Collectives: broadcasts of what rank 0 found, an all-gather of who sees it, and those of
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
            f"{checkpoint} holds a model of another shape than the recipe's; give the [model] "
            "table of its recipe.toml"
        )
    load_checkpoint(engine, checkpoint, verified, optimizer=False)
    say(f"initial weights from {checkpoint}")


@contextmanager
def _recorded(
    recipe: Recipe, platform: Platform, lease: Lease | None, resume_step: int, say: Say
) -> Iterator[tuple[Trackers, list[Hook]]]:
    """The run's trackers, told how it ended, and on the writer the ledger's record.

    What is recorded of steps after resume_step is cut off here: the attempt begins to write.

    Collectives: a broadcast of the writer's outcome over all ranks.
    """
    ledger: list[Hook] = []
    opened = [open_trackers(recipe, resume_step=resume_step, is_writer=False)]

    def begin() -> None:
        lease.begin()
        config = Path(recipe.run.dir) / CONFIG_FILE
        config.write_text(dump_toml(recipe), encoding="utf-8")
        if recipe.data.weigh_by != "units":
            ledger.append(LedgerRecord(recipe, resume_step))
        opened[:] = [open_trackers(recipe, resume_step=resume_step, is_writer=True, say=say)]
        opened[0].start(recipe_params(recipe), [config])

    decided_by_writer(platform, begin)
    (trackers,) = opened
    try:
        yield trackers, ledger
    except OwnershipError:
        # The record and the run in MLflow are the new owner's now.
        raise
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        trackers.finish("interrupted" if stopped else "failed")
        raise
    trackers.finish("finished")


def check_tokenizer(recipe: Recipe) -> TokenizerFacts:
    """The tokenizer's facts.

    Raises:
        TokenizerError: it cannot be loaded, or has more ids than the model has embeddings.
    """
    facts = load_tokenizer(recipe.tokenizer).facts
    if facts.vocab_size > recipe.model.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {facts.vocab_size} ids, model.vocab_size is "
            f"{recipe.model.vocab_size}; raise model.vocab_size or use the model's tokenizer"
        )
    return facts


def print_line(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def _silent(text: str) -> None:
    pass
