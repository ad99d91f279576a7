"""A Phi-4 small enough for a test, and engines of it inside ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phi4.config import Recipe, check, parse_recipe, with_overrides
from phi4.data.stream.batch import Batch
from phi4.engine.checkpoint import open_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.patches import Patches
from phi4.engine.platform import Platform, connect, disconnect
from phi4.verify.parity import micro_batches
from tests.support.ranks import rendezvous

TINY = {
    "model": {
        "num_layers": 8,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "init_std": 0.1,
    },
    "data": {"sequence_length": 32, "unit_tokens": 32},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optim": {"learning_rate": 1e-2, "warmup": 3, "decay": 20},
    "precision": {"dtype": "fp32"},
    "tracking": {"mlflow": False},
}


def tiny_recipe(*overrides: str) -> Recipe:
    """The tiny recipe with overrides; its rules hold."""
    recipe = with_overrides(parse_recipe(TINY), overrides)
    check(recipe)
    return recipe


def platform_of(rank: int, recipe: Recipe) -> Platform | None:
    """Inside a rank: connect those that the recipe's layout needs; None on a rank beyond them."""
    world_size = recipe.parallel.model_parallel_size * max(recipe.parallel.data, 1)
    # Every rank counts the meetings.
    meeting = rendezvous()
    if rank >= world_size:
        return None
    return connect("cpu", rank=rank, world_size=world_size, rendezvous=meeting)


@contextmanager
def engine_on(
    rank: int,
    recipe: Recipe,
    *,
    trains: bool = True,
    patches: Patches | None = None,
    checkpoint: Path | None = None,
) -> Iterator[Engine | None]:
    """Inside a rank: the recipe's engine, or None on a rank that its layout does not need.

    With a checkpoint it holds those weights, and neither `trains` nor `patches` counts.
    """
    platform = platform_of(rank, recipe)
    if platform is None:
        yield None
        return
    if checkpoint:
        engine = open_checkpoint(recipe, checkpoint, platform)
    else:
        engine = Engine(recipe, platform, trains=trains, patches=patches)
    yield engine
    engine.close()
    disconnect()


def batches_of(engine: Engine, step: int) -> Sequence[Batch]:
    """This data rank's micro-batches of a step of the parity data."""
    return micro_batches(engine.recipe, step, engine.layout.dp_rank, engine.layout.dp_size)
