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


def _open(recipe: Recipe, tokenizer: TokenizerFacts, state: RunState | None) -> Loader:
    if recipe.data.held_out:
        HeldOut(recipe.data, tokenizer, recipe.run.seed)
    if state is None:
        return Loader(recipe.data, tokenizer, recipe.run.seed)
    return open_loader(recipe, tokenizer, state)
