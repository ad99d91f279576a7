"""Compute a reference cache: the work of every rank of `phi4 dpo cache-ref`.

Data-parallel replicas divide the chunks of rows among them and do not synchronise until all are
done.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from phi4.config import Recipe
from phi4.data.stream.pair_source import PairSource
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.engine.agreement import decided_by_writer, done_by_all, wait_until_visible
from phi4.engine.engine import Engine
from phi4.engine.platform import Platform
from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.manifest import manifest_hash
from phi4.stages.reference.chunks import (
    Chunk,
    ReferenceModel,
    begin_cache,
    chunks_of,
    finish_cache,
    write_chunk,
)
from phi4.stages.reference.sides import segment_sums
from phi4.stages.reference.sources import cache_dir_of, open_preferences, read_batch
from phi4.train.initial_weights import initialise_from
from phi4.train.session import print_line
from phi4.train.sources import check_tokenizer, opened_writer_first

Say = Callable[[str], None]

CHUNK_ROWS = 64
"""Rows per chunk file; at most this much of each replica's work is lost by a kill."""


def cache_references(
    recipe: Recipe, platform: Platform, *, overwrite: bool = False, chunk_rows: int = CHUNK_ROWS
) -> None:
    """Fill `data.reference_cache` with the reference model's log-probabilities.

    Args:
        recipe: checked against the rules and the world size; names the cache.
        platform: this process.
        overwrite: replace a cache of another model or of other content.
        chunk_rows: rows per chunk; a resumed job reuses existing chunks of the same size.

    Raises:
        ConfigError: the recipe has no source of pairs or pivots.
        DataError: a source or the tokenizer is missing or wrong, or the cache is of other content.
        CheckpointError: the reference model cannot be loaded, or the cache is of another one.
        DiskFullError: the cache does not fit on the disk.

    Collectives: those of building the engine, of loading and of `Engine.log_probs`; broadcasts of
    the writer's decisions and two all-gathers of verdicts over all ranks.
    """
    say: Say = print_line if platform.is_writer else _silent
    directory = Path(cache_dir_of(recipe))
    tokenizer = done_by_all(platform, partial(check_tokenizer, recipe))
    sources = opened_writer_first(platform, partial(open_preferences, recipe, tokenizer))
    engine, model = _reference(recipe, platform, say)

    def begin() -> list[Chunk] | None:
        if begin_cache(directory, model, sources, overwrite=overwrite):
            return None
        return [chunk for chunk in chunks if not chunk.path.exists()]

    chunks = chunks_of(directory, sources, chunk_rows)
    missing = decided_by_writer(platform, begin)
    if missing is None:
        say(
            f"reference cache {directory} is complete for this model and these sources; nothing to "
            f"do"
        )
    else:
        if len(missing) < len(chunks):
            say(f"{len(chunks) - len(missing)} of {len(chunks)} chunks already exist")
        _compute(engine, sources, missing, tokenizer, say)
        done_by_all(platform, lambda: None)
        wait_until_visible(platform, [chunk.path for chunk in missing])
        num_items = decided_by_writer(platform, partial(finish_cache, directory, sources, chunks))
        say(f"reference cache {directory}: {num_items:,} pairs of {len(sources)} sources")
    engine.close()


def _reference(recipe: Recipe, platform: Platform, say: Say) -> tuple[Engine, ReferenceModel]:
    """Return the reference model in the recipe's layout, and its description for the cache."""
    place = recipe.dpo.reference or recipe.run.init_from
    found = decided_by_writer(platform, partial(_found, place)) if place else None
    engine = Engine(recipe, platform, trains=False, draws_weights=place is None)
    say(platform.describe())
    say(engine.layout.describe())
    if found is not None:
        initialise_from(engine, found[0], say)
    checkpoint, digest = ("", "") if found is None else (str(found[0]), found[1])
    weights = engine.weights_sha256()
    return engine, ReferenceModel(recipe.precision.dtype, weights, checkpoint, digest)


def _found(place: str) -> tuple[Path, str]:
    checkpoint = find_checkpoint(Path(place))
    return checkpoint, manifest_hash(checkpoint)


def _compute(
    engine: Engine,
    sources: Sequence[PairSource],
    missing: Sequence[Chunk],
    tokenizer: TokenizerFacts,
    say: Say,
) -> None:
    """Compute this replica's share of the missing chunks."""
    layout = engine.layout
    share = missing[layout.dp_rank :: layout.dp_size]
    writes = (layout.tp_rank, layout.pp_rank, layout.cp_rank) == (0, 0, 0)
    total, done, begun = sum(len(chunk.rows) for chunk in share), 0, time.monotonic()
    for chunk in share:
        sums = _chunk_sums(engine, sources[chunk.source], chunk.rows, tokenizer)
        if writes:
            write_chunk(chunk, sums)
        done += len(chunk.rows)
        rate = done / (time.monotonic() - begun)
        say(
            f"rows {done:,} of {total:,} of this replica ({layout.dp_size} in all), "
            f"{rate * engine.recipe.data.sequence_length * layout.dp_size:,.0f} tokens/s, "
            f"{(total - done) / rate:,.0f} s remain"
        )


def _chunk_sums(
    engine: Engine, source: PairSource, rows: range, tokenizer: TokenizerFacts
) -> np.ndarray:
    """Return log-probabilities of both sides of the pairs of some rows, [pairs, 2] float64.

    Collectives: those of `Engine.log_probs`.
    """
    recipe = engine.recipe
    num_rows = recipe.batch.micro_batch_size
    batches = [
        read_batch(
            source,
            rows[begin : begin + num_rows],
            num_rows,
            tokenizer,
            document_mask=recipe.data.document_mask,
        )
        for begin in range(0, len(rows), num_rows)
    ]
    found = engine.log_probs(batches)
    sums = [segment_sums(batch, log_probs) for batch, log_probs in zip(batches, found, strict=True)]
    return np.concatenate(sums).reshape(-1, 2)


def _silent(text: str) -> None:
    pass
