"""What ranks do for the tests of decoding against transformers.

Apart from those tests, because a rank imports the module of its function, and transformers takes
1.6 CPU seconds.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from phi4.config import Recipe, dump_toml
from phi4.convert import read_hf
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.generation.events import Event
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import StepLimits
from tests.support.engines import engine_on
from tests.support.generation import Asked, collect, generate

BLOCK_TOKENS = 8


def save(rank: int, world_size: int, recipe: Recipe, hf_dir: Path, root: Path) -> Path | None:
    """A checkpoint of the weights of a Hugging Face directory, in the recipe's layout."""
    files = {"recipe.toml": dump_toml(recipe)}
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is None:
            return None
        engine.load_whole_parameters(dict(read_hf(hf_dir)[1]()))
        return save_checkpoint(engine, root, 0, form="none", keep=1, files=files, data={})


def run(
    rank: int,
    world_size: int,
    recipe: Recipe,
    hf_dir: Path,
    checkpoint: Path | None,
    requests: Sequence[Asked],
    step_tokens: int,
) -> list[list[Event]] | None:
    """What every step reports, with weights of the checkpoint or of the Hugging Face directory.

    The cache has room for all requests at once, and a step computes at most `step_tokens`.
    """
    with engine_on(rank, recipe, trains=False, checkpoint=checkpoint) as engine:
        if engine is None:
            return None
        if checkpoint is None:
            engine.load_whole_parameters(dict(read_hf(hf_dir)[1]()))
        lengths = [len(request.prompt) + request.max_tokens for request in requests]
        size = CacheSize(sum(-(-length // BLOCK_TOKENS) for length in lengths), BLOCK_TOKENS)
        limits = StepLimits(step_tokens, step_tokens)
        with Generator(engine, size, "weights", limits=limits) as generator:
            return generate(generator, requests)


def run_scored(rank: int, *args) -> list[torch.Tensor] | None:
    """Log-probabilities [T - 1, V] after every token but the last of each text, on rank 0.

    The requests report as many top log-probabilities as there are ids; arguments as of `run`.
    """
    steps = run(rank, *args)
    if rank:
        return None
    requests = args[-2]
    found = collect([event for events in steps for event in events], len(requests))
    return [_by_id(one["prompt_tops"] + one["tops"]) for one in found]


def _by_id(tops: list[tuple[tuple[int, float], ...]]) -> torch.Tensor:
    ids_TV, values_TV = torch.tensor(tops, dtype=torch.float64).unbind(-1)
    return torch.empty_like(values_TV).scatter_(1, ids_TV.long(), values_TV)
