"""A run from its recipe to its end: directory, engine, resume, loop, trackers.

Everything that can be wrong is checked before anything is written over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phi4.config import Recipe, dump_toml
from phi4.data.tokenizer import TokenizerFacts, load_tokenizer
from phi4.engine.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    verify_checkpoint,
)
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.errors import CheckpointError, TokenizerError
from phi4.track import Trackers, open_trackers, recipe_params
from phi4.train.checkpointing import (
    Checkpointer,
    checkpoints_of,
    first_state,
    read_recipe,
    resume,
)
from phi4.train.evaluation import HeldOutLoss
from phi4.train.hooks import Hook, Meter
from phi4.train.ledger_record import LedgerRecord
from phi4.train.loop import train
from phi4.train.sources import open_loader, open_sources
from phi4.train.state import RunState

Say = Callable[[str], None]
CONFIG_FILE = "config.toml"


def run_training(
    recipe: Recipe,
    platform: Platform,
    objective: Objective,
    *,
    allow_change: bool,
    ranks_per_host: int,
    hooks: Sequence[Hook] = (),
) -> RunState:
    """Train a recipe to its last step, from its newest checkpoint where there is one.

    Args:
        recipe: checked against the rules.
        platform: this process.
        objective: the stage's loss.
        allow_change: schedule keys may differ from the run's.
        ranks_per_host: processes that share a machine's memory.
        hooks: called after the run's own.

    Raises:
        ConfigError: the recipe does not continue the run in run.dir.
        DataError: a source or the tokenizer is missing or wrong.
        CheckpointError: no checkpoint of the run can be used.

    Collectives: those of building the engine, of loading, of every step and hook.
    """
    say = print_line if platform.is_writer else _silent
    tokenizer = check_tokenizer(recipe)
    resumes = latest_checkpoint(checkpoints_of(recipe)) is not None
    state = None if resumes else first_state(recipe)
    # Before anything is built: a missing or foreign source is an error at once.
    loader = open_sources(recipe, tokenizer, state, platform)
    draws_weights = not resumes and recipe.run.init_from is None
    engine = Engine(recipe, platform, draws_weights=draws_weights)
    for line in (
        platform.describe(),
        engine.layout.describe(),
        *(choice.describe() for choice in engine.choices),
        *loader.notes,
    ):
        say(line)
    if state is None:
        state = resume(recipe, engine, allow_change=allow_change, say=say)
        loader = open_loader(recipe, tokenizer, state)
    else:
        _begin(recipe, engine, state, say)
    own_hooks = [
        Meter(),
        HeldOutLoss(recipe, engine, objective, tokenizer),
        *_ledger_record(recipe, platform, state),
        Checkpointer(recipe, engine, loader.source_hashes(), ranks_per_host, say),
    ]
    with _followed(recipe, platform, state.step, say) as trackers:
        state = train(
            recipe, engine, loader, objective, [*own_hooks, *hooks], state, record=trackers.log
        )
    engine.close()
    return state


def _begin(recipe: Recipe, engine: Engine, state: RunState, say: Say) -> None:
    if recipe.run.init_from is not None:
        initialise_from(engine, Path(recipe.run.init_from), say)
    if state.ledger_from:
        say(f"data: the ledger of {state.ledger_from} goes on")


def _ledger_record(recipe: Recipe, platform: Platform, state: RunState) -> list[Hook]:
    if recipe.data.weigh_by == "units" or not platform.is_writer:
        return []
    return [LedgerRecord(recipe, state.step)]


def initialise_from(engine: Engine, place: Path, say: Say) -> None:
    """Take the weights, and nothing else, of a checkpoint of the same shape.

    Raises:
        CheckpointError: damaged, or its model has another shape.

    Collectives: those of `load_checkpoint`.
    """
    checkpoint = find_checkpoint(place)
    manifest = verify_checkpoint(engine, checkpoint)
    shape, asked = read_recipe(checkpoint).model, engine.recipe.model
    # RoPE has no weights, so its base and the longest sequence may change: midtraining does that.
    free = {"rope_theta": 0.0, "max_position_embeddings": 0, "init_std": 0.0}
    if shape.model_copy(update=free) != asked.model_copy(update=free):
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape than the recipe's; give the [model] "
            "table of its recipe.toml"
        )
    load_checkpoint(engine, checkpoint, manifest, optimizer=False)
    say(f"initial weights from {checkpoint}")


@contextmanager
def _followed(recipe: Recipe, platform: Platform, resume_step: int, say: Say) -> Iterator[Trackers]:
    """The run's trackers, told truthfully how it ended."""
    run_dir = Path(recipe.run.dir)
    if platform.is_writer:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG_FILE).write_text(dump_toml(recipe), encoding="utf-8")
    trackers = open_trackers(recipe, resume_step=resume_step, is_writer=platform.is_writer, say=say)
    trackers.start(recipe_params(recipe), [run_dir / CONFIG_FILE])
    try:
        yield trackers
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
