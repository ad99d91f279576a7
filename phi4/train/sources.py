"""Opening a run's data sources: once, before anything is built, and the writer first.

A thousand ranks that meet a new source at once would each read every shard's manifest and pack the
same rows, so the writer opens first and keeps both next to the shards. What the writer finds wrong,
every rank raises; a rank that fails alone is named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from phi4.config import Recipe
from phi4.data.stream.loader import HeldOut, Loader, open_held_out
from phi4.data.stream.read_ahead import ReadAheadLoader
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.engine.agreement import decided_by_writer, done_by_all
from phi4.engine.platform import Platform
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
        """Let the loader continue from a state to the run's last step.

        Raises:
            DataError: the state's ledger did not count these sources, or one would be read more
                often than its `max_epochs`.
        """
        self.loader.go_to(state.data)
        self.loader.require_epochs((recipe.run.steps - state.step) * recipe.batch.global_batch_size)


def open_sources(
    recipe: Recipe, tokenizer: TokenizerFacts, state: RunState | None, platform: Platform
) -> RunData:
    """The run's sources, open.

    Args:
        recipe: the run.
        tokenizer: whose ids the sources hold.
        state: where the run begins; None where a checkpoint will tell, for `RunData.go_to`.
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
    """What `open_it` returns on this rank: called on the writer, and when that went well elsewhere.

    Raises:
        Phi4Error: raised by `open_it`, on every rank.

    Collectives: as `open_sources`.
    """
    opened: list[Opened] = []
    decided_by_writer(platform, lambda: opened.append(open_it()))
    return done_by_all(platform, lambda: opened[0] if opened else open_it())
