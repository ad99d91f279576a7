"""Opening a run's data sources: the writer first, so what is kept beside the shards is made once.

A thousand ranks that meet a new source at once would each read every shard's manifest and pack the
same rows. What the writer finds wrong, every rank raises.
"""

import torch.distributed as dist

from phi4.config import Recipe
from phi4.data.loader import HeldOut, Loader
from phi4.data.tokenizer import TokenizerFacts
from phi4.engine.platform import Platform
from phi4.errors import Phi4Error
from phi4.train.state import RunState


def open_sources(
    recipe: Recipe, tokenizer: TokenizerFacts, state: RunState, platform: Platform
) -> Loader:
    """A loader of the run's sources, once the held-out ones were found as well.

    Args:
        recipe: the run.
        tokenizer: whose ids the sources hold.
        state: where the run begins.
        platform: this process.

    Raises:
        DataError: a source is missing, damaged, or not what the state's ledger counted.

    Collectives: a broadcast of the writer's error, if any, over all ranks.
    """
    opened: Loader | Phi4Error | None = None
    if platform.is_writer:
        try:
            opened = _open(recipe, tokenizer, state)
        except Phi4Error as error:
            opened = error
    if platform.world_size > 1:
        verdict = [opened if isinstance(opened, Phi4Error) else None]
        dist.broadcast_object_list(verdict, src=0, device=platform.device)
        opened = verdict[0] or opened
    if isinstance(opened, Phi4Error):
        raise opened
    return opened or _open(recipe, tokenizer, state)


def _open(recipe: Recipe, tokenizer: TokenizerFacts, state: RunState) -> Loader:
    if recipe.data.held_out:
        HeldOut(recipe.data, tokenizer, recipe.run.seed)
    return Loader(recipe.data, tokenizer, recipe.run.seed, state.data)
