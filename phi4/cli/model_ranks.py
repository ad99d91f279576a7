"""A model on the ranks of its layout, with a sampler on the leading rank."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi4.config import Recipe, check
from phi4.errors import ConfigError
from phi4.launch import WorkerEnvironment, join, on_ranks
from phi4.model.shape import DTYPE_BYTES, format_bytes

if TYPE_CHECKING:
    from phi4.convert.model_source import ModelSource
    from phi4.engine.platform import Platform
    from phi4.sampling.local import LocalSampler
    from phi4.sampling.protocol import Sampler

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run directory (its latest checkpoint), a step_NNNNNNN directory, or a Hugging Face "
        "directory (config.json, safetensors, tokenizer.json).",
    ),
]

LEAST_CACHE_TOKENS = 16_384
_BLOCK_TOKENS = 16


def on_model_ranks(
    argv: Sequence[str],
    source: "ModelSource",
    cache_tokens: int | None,
    use: Callable[["Sampler"], None],
    *,
    batch_invariant: bool = False,
    interactive: bool = False,
) -> int:
    """Load a model on all ranks of its layout and use it on the leading one.

    Args:
        argv: arguments that make `phi4` call this function again, for the workers.
        source: the model.
        cache_tokens: room for keys and values; None for the default.
        use: called with the sampler on the leading rank. The others follow until it returns.
        batch_invariant: as in `phi4.engine.generation.decode.Decoder`.
        interactive: as in `phi4.launch.on_ranks`.

    Returns:
        Exit code; 0 when `use` returned, or the reader of stdout went away.
    """

    return on_ranks(
        argv,
        lambda worker: on_model_rank(worker, source, cache_tokens, use, batch_invariant),
        num_workers=source.recipe.parallel.model_parallel_size,
        work_dir=logs_of(argv[0]),
        interactive=interactive,
    )


def logs_of(command: str) -> Path:
    """Where the ranks of a command write their logs, which has no run directory of its own."""
    return Path(tempfile.gettempdir()) / f"phi4-{command}-{os.getpid()}"


def on_model_rank(
    worker: WorkerEnvironment,
    source: "ModelSource",
    cache_tokens: int | None,
    use: Callable[["LocalSampler"], None],
    batch_invariant: bool = False,
) -> None:
    """One rank's part of `on_model_ranks`.

    Collectives: those of joining, of opening the source and of every step of the generator.
    """
    from phi4.engine.platform import disconnect

    check(source.recipe, worker.world_size)
    platform = join(worker, source.recipe.run.platform, source.recipe.run.threads)
    _sample(source, platform, cache_tokens, batch_invariant, use)
    disconnect()


def _sample(
    source: "ModelSource",
    platform: "Platform",
    cache_tokens: int | None,
    batch_invariant: bool,
    use: Callable[["LocalSampler"], None],
) -> None:
    """One rank's part.

    Collectives: those of opening the source and of every step of the generator.
    """
    from phi4.engine.generation.generator import CacheSize, Generator
    from phi4.sampling.local import LocalSampler

    tokenizer, recipe = source.tokenizer(), source.recipe
    num_tokens = cache_tokens or max(LEAST_CACHE_TOKENS, 2 * recipe.model.max_position_embeddings)
    size = CacheSize(-(-num_tokens // _BLOCK_TOKENS), _BLOCK_TOKENS)
    engine = source.open(platform)
    cache_bytes = size.num_blocks * _BLOCK_TOKENS * _bytes_per_token(recipe)
    _check_memory(num_tokens, cache_bytes // platform.world_size, platform.kind)
    if platform.is_writer:
        cache = f"cache: {num_tokens:,} tokens, {format_bytes(cache_bytes)} over all processes"
        typer.echo(f"{platform.describe()}\n{engine.layout.describe()}\n{cache}", err=True)
    with Generator(
        engine,
        size,
        str(source.path),
        num_ids=tokenizer.vocab_size,
        batch_invariant=batch_invariant,
        load_weights=lambda place: source.load_into(engine, Path(place)),
    ) as generator:
        if generator.leads:
            sampler = LocalSampler(generator, tokenizer)
            try:
                use(sampler)
            except BrokenPipeError:
                # The reader closed the pipe, as `head` does; Python's last flush goes to null.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # Not after an error: the launcher ends the others, which may wait in mid-step.
            sampler.close()
        else:
            generator.follow()
    engine.close()


def _check_memory(num_tokens: int, num_bytes: int, kind: str) -> None:
    """Refuse a cache that this process's device could never hold.

    Args:
        num_tokens: of the cache.
        num_bytes: of this process's part of it.
        kind: of the platform.

    Raises:
        ConfigError: it has less memory free.
    """
    import psutil
    import torch

    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available
    if num_bytes > free:
        raise ConfigError(
            f"a cache of {num_tokens:,} tokens takes {format_bytes(num_bytes)} on a process, "
            f"{format_bytes(free)} are free; lower --cache-tokens, or split the model further"
        )


def _bytes_per_token(recipe: Recipe) -> int:
    """Keys and values of a token in all layers."""
    model = recipe.model
    values = 2 * model.num_layers * model.num_key_value_heads * model.head_dim
    return values * DTYPE_BYTES[recipe.precision.dtype]
