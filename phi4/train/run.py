"""A run from its recipe to its end: directory, engine, resume, loop, trackers.

Everything that can be wrong is checked before anything is written over.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from phi4.config import Recipe, dump_toml
from phi4.data.loader import Loader
from phi4.data.tokenizer import TokenizerFacts, load_tokenizer
from phi4.engine.checkpoint import load_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.errors import ConfigError, TokenizerError
from phi4.track import Trackers, open_trackers
from phi4.train.checkpointing import Checkpointer, checkpoints_of, read_recipe, resume
from phi4.train.evaluation import HeldOutLoss
from phi4.train.hooks import Hook, Meter
from phi4.train.loop import train
from phi4.train.state import RECIPE_FILE, RunState

Say = Callable[[str], None]


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
    say = _speaker(platform)
    tokenizer = check_tokenizer(recipe)
    Loader(recipe.data, tokenizer, recipe.run.seed)
    engine = Engine(recipe, platform)
    say(platform.describe())
    say(engine.layout.describe())
    for choice in engine.choices:
        say(choice.describe())
    state = _start(recipe, engine, allow_change=allow_change, say=say)
    loader = Loader(recipe.data, tokenizer, recipe.run.seed, state.data)
    held_out = HeldOutLoss(recipe, engine, objective, tokenizer)
    saver = Checkpointer(recipe, engine, loader.source_hashes(), ranks_per_host, say)
    with tracked(recipe, platform, state) as trackers:
        state = train(
            recipe,
            engine,
            loader,
            objective,
            [Meter(), held_out, saver, *hooks],
            state,
            record=trackers.log,
        )
    engine.close()
    return state


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
