"""A directory with pairs, pivots and a checkpoint, and preference runs in it on ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

import numpy as np
from megatron.core import parallel_state

from phi4.config import Recipe, TokenizerConfig, dump_toml
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.vocabulary.tokenizer import TokenizerFacts, load_tokenizer
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.platform import Platform, disconnect
from phi4.errors import Phi4Error
from phi4.rundir.checkpoints import checkpoints_dir
from phi4.rundir.names import RECIPE_FILE, STATE_FILE
from phi4.rundir.state import RunState
from phi4.stages import stage_of
from phi4.stages.reference import cache_references
from phi4.train.session import run_training
from tests.data.preferences import Pivots, Side, drawn_pairs, drawn_pivots
from tests.support.byte_source import write_byte_tokenizer
from tests.support.engines import platform_of, tiny_recipe

NUM_PAIRS, NUM_TRAJECTORIES = 10, 5
SOURCES = (
    "[{name='pairs', path='pairs', kind='pairs', weight=2},"
    " {name='pivots', path='pivots', kind='pivots', weight=1}]"
)
HELD_OUT = "[{name='others', path='others', kind='pairs'}]"
RECIPE = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=512"),
    *("model.num_layers=2", "run.stage=dpo", "run.init_from=start", "run.steps=2"),
    *(f"data.sources={SOURCES}", f"data.held_out={HELD_OUT}", "data.reference_cache=cache"),
    *("batch.global_batch_size=4", "batch.micro_batch_size=1", "checkpoint.every=1"),
    # Large steps: after one, the model is another.
    *("optim.warmup=1", "optim.learning_rate=1e-2"),
)


def recipe_of(*overrides: str) -> Recipe:
    """The preference recipe; its paths are relative to the directory."""
    return tiny_recipe(*RECIPE, *overrides)


def write_files(root: Path) -> None:
    """Tokenizer, two sources and a held-out one; the checkpoint is `write_start`'s."""
    write_byte_tokenizer(root)
    write_pairs(root, "pairs", drawn_pairs(NUM_PAIRS))
    write_pairs(root, "others", drawn_pairs(3, seed=1))
    write_pivots(root, drawn_pivots(NUM_TRAJECTORIES))


def write_pairs(root: Path, name: str, pairs: Sequence[tuple[Side, Side]], **notes: str) -> None:
    with TokenFileWriter(root / name, facts(root), kind="pairs", **notes) as writer:
        for sides in pairs:
            ids, masks = (np.concatenate(column) for column in zip(*sides, strict=True))
            writer.add_many(_small(ids), [side.ids.size for side in sides], masks)


def write_pivots(root: Path, documents: Sequence[Pivots]) -> None:
    with TokenFileWriter(root / "pivots", facts(root), kind="pivots") as writer:
        for ids, positions, chosen, rejected in documents:
            parts = (_small(ids), positions, _small(chosen), _small(rejected))
            writer.add_many(np.concatenate(parts), [part.size for part in parts])


def facts(root: Path) -> TokenizerFacts:
    return load_tokenizer(TokenizerConfig(kind="bpe", path=str(root / "bpe.tiktoken"))).facts


def start(
    rank: int,
    world_size: int,
    root: Path,
    run_dir: str = "start",
    seed: int = 1,
    overrides: Sequence[str] = (),
) -> None:
    """Write a checkpoint of weights drawn from a seed, on one rank."""
    recipe = recipe_of(f"run.seed={seed}", *overrides)
    with joined(rank, world_size, root, recipe) as platform:
        if platform is None:
            return
        engine = Engine(recipe, platform, trains=False)
        texts = {RECIPE_FILE: dump_toml(recipe), STATE_FILE: RunState().to_json()}
        save_checkpoint(
            engine, checkpoints_dir(run_dir), 0, form="none", keep=1, files=texts, data={}
        )
        engine.close()


def cache(
    rank: int, world_size: int, root: Path, overrides: Sequence[str] = (), overwrite: bool = False
) -> str:
    """One rank of `phi4 dpo cache-ref`; gives the error that it ends with, if any."""
    return cache_for(
        rank, world_size, root, recipe_of(*overrides), overwrite=overwrite, chunk_rows=1
    )


def cache_for(rank: int, world_size: int, root: Path, recipe: Recipe, **options: bool | int) -> str:
    """`cache` for any recipe; the options are those of `cache_references`."""
    with joined(rank, world_size, root, recipe) as platform:
        if platform is not None:
            return _error(lambda: cache_references(recipe, platform, **options))
    return ""


def run(rank: int, world_size: int, root: Path, overrides: Sequence[str] = ()) -> str:
    """One rank of a run; gives the error that it ends with, if any."""
    return run_of(rank, world_size, root, recipe_of(*overrides))


def run_of(rank: int, world_size: int, root: Path, recipe: Recipe) -> str:
    """`run` of any recipe."""
    with joined(rank, world_size, root, recipe) as platform:
        if platform is not None:
            stage = stage_of(recipe)
            objective, hooks = stage.make_objective(recipe), stage.hooks
            return _error(
                lambda: run_training(recipe, platform, objective, allow_change=False, hooks=hooks)
            )
    return ""


@contextmanager
def joined(rank: int, world_size: int, root: Path, recipe: Recipe) -> Iterator[Platform | None]:
    """In the directory, joined; None on a rank that the layout does not need."""
    with chdir(root):
        platform = platform_of(rank, recipe)
        if platform is None:
            yield None
            return
        try:
            yield platform
        finally:
            # What ends in an error leaves its groups to the end of its process.
            parallel_state.destroy_model_parallel()
            disconnect()


def _error(act: Callable[[], object]) -> str:
    try:
        act()
    except Phi4Error as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _small(ids: np.ndarray) -> np.ndarray:
    """Ids of the byte tokenizer."""
    return ids % 240 + 1
