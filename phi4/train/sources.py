"""Opening a run's tokenizer and sources, before anything is built; sources on the writer first.

If a thousand ranks opened a new source at once, each would read every shard's manifest and pack the
same rows. So the writer opens it first and caches both next to the shards. An error on the writer
is raised on every rank; a rank that fails alone is named in the error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from phi4.config import Recipe
from phi4.data.stream.loader import HeldOut, Loader, open_held_out
from phi4.data.stream.read_ahead import ReadAheadLoader
from phi4.data.vocabulary.tokenizer import TokenizerFacts, load_tokenizer
from phi4.engine.agreement import decided_by_writer, done_by_all
from phi4.engine.platform import Platform
from phi4.errors import TokenizerError
from phi4.rundir.state import RunState

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class RunData:
    """The open sources of a run.

    Attributes:
        loader: serves `data.sources`.
        held_out: sources of `data.held_out`, by name.
    """

    loader: Loader
    held_out: Mapping[str, HeldOut]

    def go_to(self, recipe: Recipe, state: RunState) -> None:
        """Move the loader to a state, and check that the sources last for the remaining steps.

        Raises:
            DataError: the state's ledger belongs to other sources, or a source would be read more
                often than its `max_epochs`.
        """
        self.loader.go_to(state.data)
        self.loader.require_epochs((recipe.run.steps - state.step) * recipe.batch.global_batch_size)


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


def open_sources(
    recipe: Recipe, tokenizer: TokenizerFacts, state: RunState | None, platform: Platform
) -> RunData:
    """The run's sources, open.

    Args:
        recipe: the run's recipe.
        tokenizer: the tokenizer of the sources.
        state: the first state of a new run; None if it is read from a checkpoint later and given to
            `RunData.go_to`.
        platform: this process.

    Raises:
        DataError: a source is missing, damaged or from another tokenizer; or as `RunData.go_to`.
        PlatformError: a rank cannot read what the writer read.

    Collectives: a broadcast of the writer's outcome and an all-gather of the others' over all
    ranks.
    """

    def open_all() -> RunData:
        held_out = open_held_out(recipe.data, tokenizer, recipe.run.seed)
        data = RunData(ReadAheadLoader(recipe.data, tokenizer, recipe.run.seed), held_out)
        if state is not None:
            data.go_to(recipe, state)
        return data

    return opened_writer_first(platform, open_all)


def opened_writer_first(platform: Platform, open_it: Callable[[], Opened]) -> Opened:
    """Call `open_it` on the writer and, if it succeeds there, on the other ranks.

    Raises:
        Phi4Error: raised by `open_it`, on every rank.

    Collectives: as `open_sources`.
    """
    opened: list[Opened] = []
    decided_by_writer(platform, lambda: opened.append(open_it()))
    return done_by_all(platform, lambda: opened[0] if opened else open_it())
