"""Opening a run's data sources: the writer first, so what is kept beside the shards is made once.

A thousand ranks that meet a new source at once would each read every shard's manifest and pack the
same rows. What the writer finds wrong, every rank raises; a rank that fails alone is named.
"""

from collections.abc import Callable
from typing import TypeVar

from phi4.config import Recipe
from phi4.data.stream.loader import HeldOut, Loader
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.engine.agreement import decided_by_writer, done_by_all
from phi4.engine.platform import Platform
from phi4.rundir.state import RunState

Opened = TypeVar("Opened")


def open_loader(recipe: Recipe, tokenizer: TokenizerFacts, state: RunState) -> Loader:
    """A loader that goes on from a state to the run's last step.

    Raises:
        DataError: a source is missing, damaged, not what the state's ledger counted, or would be
            read more often than its `max_epochs`.
    """
    loader = Loader(recipe.data, tokenizer, recipe.run.seed, state.data)
    loader.require_epochs((recipe.run.steps - state.step) * recipe.batch.global_batch_size)
    return loader


def open_sources(
    recipe: Recipe, tokenizer: TokenizerFacts, state: RunState | None, platform: Platform
) -> Loader:
    """The run's loader, once the held-out sources were found as well.

    Args:
        recipe: the run.
        tokenizer: whose ids the sources hold.
        state: where the run begins; None where a checkpoint will tell, which leaves its ledger to
            `open_loader`.
        platform: this process.

    Raises:
        DataError: see `open_loader`.
        PlatformError: a rank cannot read what the writer read.

    Collectives: a broadcast of the writer's outcome and an all-gather of the others' over all
    ranks.
    """
    return opened_writer_first(platform, lambda: _open(recipe, tokenizer, state))


def opened_writer_first(platform: Platform, open_it: Callable[[], Opened]) -> Opened:
    """What `open_it` returns on this rank: called on the writer, and when that went well elsewhere.

    Raises:
        Phi4Error: raised by `open_it`, on every rank.

    Collectives: as `open_sources`.
    """
    opened: list[Opened] = []
    decided_by_writer(platform, lambda: opened.append(open_it()))
    return done_by_all(platform, lambda: opened[0] if opened else open_it())


def _open(recipe: Recipe, tokenizer: TokenizerFacts, state: RunState | None) -> Loader:
    if recipe.data.held_out:
        HeldOut(recipe.data, tokenizer, recipe.run.seed)
    if state is None:
        return Loader(recipe.data, tokenizer, recipe.run.seed)
    return open_loader(recipe, tokenizer, state)
