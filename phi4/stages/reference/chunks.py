"""The files of a reference cache during computation: chunks of rows, then one array per source.

A chunk is written under its name only when it is complete, so a killed job continues with the
missing chunks, and the final result is bit-identical.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec
import numpy as np

from phi4.data.files.atomic_files import file_error, write_atomically
from phi4.data.files.manifest import encode_manifest
from phi4.data.stream.pair_source import PairSource
from phi4.data.stream.reference_files import (
    FINISHED,
    UNFINISHED,
    ReferenceManifest,
    array_bytes,
    array_path,
    array_sha256,
    source_references,
)
from phi4.data.stream.references import ReferenceCache, read_cache
from phi4.errors import DataError, Phi4Error

_CHUNKS_DIR = "chunks"
_REMEDY = "use --overwrite to recompute it, or another data.reference_cache"


@dataclass(frozen=True)
class Chunk:
    """Rows [begin, end) of one source."""

    source: int
    """Index among the sources of the recipe."""
    begin: int
    end: int
    path: Path

    @property
    def rows(self) -> range:
        """The rows."""
        return range(self.begin, self.end)


@dataclass(frozen=True)
class ReferenceModel:
    """Whose log-probabilities are computed; see `ReferenceManifest`."""

    dtype: str
    weights: dict[str, str]
    checkpoint: str
    checkpoint_manifest_sha256: str


def chunks_of(directory: Path, sources: Sequence[PairSource], chunk_rows: int) -> list[Chunk]:
    """Split all rows of all sources, in order, into chunks."""
    chunks = []
    for index, source in enumerate(sources):
        folder = directory / _CHUNKS_DIR / quote(source.name, safe="")
        for begin in range(0, source.num_units, chunk_rows):
            end = min(begin + chunk_rows, source.num_units)
            chunks.append(Chunk(index, begin, end, folder / f"rows_{begin:09d}_{end:09d}.npy"))
    return chunks


def begin_cache(
    directory: Path,
    model: ReferenceModel,
    sources: Sequence[PairSource],
    *,
    overwrite: bool,
) -> bool:
    """Prepare a directory for the chunks of a cache; reads all shards.

    Args:
        directory: directory of the cache; created if missing.
        model: the reference.
        sources: what it is computed for.
        overwrite: remove a cache of something else.

    Returns:
        Whether it already holds the finished cache.

    Raises:
        Phi4Error: it holds the cache of another model, format or content, and may not be
            overwritten.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in (FINISHED, UNFINISHED):
        try:
            cache = read_cache(directory, name, _REMEDY)
            if cache is not None:
                _check(cache, model, sources)
                return name == FINISHED
        except Phi4Error:
            if not overwrite:
                raise
            _clear(directory)
    _write_key(directory, model, sources)
    return False


def write_chunk(chunk: Chunk, sums: np.ndarray) -> None:
    """Write the log-probabilities of the pairs of a chunk's rows, in order, [pairs, 2] float64.

    Raises:
        DiskFullError: it does not fit on the disk.
        DataError: it cannot be written.
    """
    try:
        chunk.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(chunk.path, array_bytes(sums))
    except OSError as error:
        raise file_error(error, chunk.path) from None


def finish_cache(directory: Path, sources: Sequence[PairSource], chunks: Sequence[Chunk]) -> int:
    """Merge the chunks into one array per source, then write the manifest; return the number of
    items.

    Raises:
        DataError: a chunk is damaged or does not match its rows, an item is in no row, or a
            log-probability is not finite.
    """
    unfinished = read_cache(directory, UNFINISHED, _REMEDY)
    if unfinished is None:
        raise DataError(f"{directory / UNFINISHED} is missing; run the same command again")
    entries = dict(unfinished.manifest.sources)
    for index, source in enumerate(sources):
        log_probs = _merged(source, [chunk for chunk in chunks if chunk.source == index])
        write_atomically(array_path(directory, source.name, "log_probs"), array_bytes(log_probs))
        entries[source.name] = msgspec.structs.replace(
            entries[source.name], log_probs_sha256=array_sha256(log_probs)
        )
    manifest = msgspec.structs.replace(unfinished.manifest, sources=entries)
    write_atomically(directory / FINISHED, encode_manifest(manifest))
    (directory / UNFINISHED).unlink()
    shutil.rmtree(directory / _CHUNKS_DIR, ignore_errors=True)
    return sum(entry.num_items for entry in entries.values())


def _check(cache: ReferenceCache, model: ReferenceModel, sources: Sequence[PairSource]) -> None:
    cache.check_model(model.dtype, model.weights)
    cache.check_names(source.name for source in sources)
    for source in sources:
        cache.check_source(source)


def _clear(directory: Path) -> None:
    """Remove the files of a cache, and no other files."""
    for name in (FINISHED, UNFINISHED):
        (directory / name).unlink(missing_ok=True)
    for pattern in ("*.items.npy", "*.log_probs.npy"):
        for path in directory.glob(pattern):
            path.unlink()
    shutil.rmtree(directory / _CHUNKS_DIR, ignore_errors=True)


def _write_key(directory: Path, model: ReferenceModel, sources: Sequence[PairSource]) -> None:
    # Chunks without a key belong to an unknown cache.
    shutil.rmtree(directory / _CHUNKS_DIR, ignore_errors=True)
    entries = {}
    for source in sources:
        hashes = source.item_hashes()
        write_atomically(array_path(directory, source.name, "items"), array_bytes(hashes))
        entries[source.name] = source_references(source, hashes)
    manifest = ReferenceManifest(
        dtype=model.dtype,
        weights=model.weights,
        checkpoint=model.checkpoint,
        checkpoint_manifest_sha256=model.checkpoint_manifest_sha256,
        sources=entries,
    )
    write_atomically(directory / UNFINISHED, encode_manifest(manifest))


def _merged(source: PairSource, chunks: Sequence[Chunk]) -> np.ndarray:
    """Return log-probabilities of all items of a source, [items, 2] float64."""
    log_probs = np.full((source.num_items, 2), np.nan)
    for chunk in chunks:
        items = np.concatenate([source.row_items(row) for row in chunk.rows])
        log_probs[items] = _read(chunk, items.size)
    wrong = np.flatnonzero(~np.isfinite(log_probs).all(axis=1))
    if wrong.size:
        chosen, rejected = log_probs[wrong[0]]
        raise DataError(
            f"item {wrong[0]} ({source.locate_item(int(wrong[0]))}) has log-probabilities {chosen} "
            f"and {rejected}, expected finite ones; check the reference model's weights"
        )
    return log_probs


def _read(chunk: Chunk, num_items: int) -> np.ndarray:
    try:
        values = np.load(chunk.path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{chunk.path} cannot be read ({error}); remove it and run the same command again"
        ) from None
    if values.shape != (num_items, 2) or values.dtype != np.float64:
        raise DataError(
            f"{chunk.path} holds {values.dtype} {values.shape}, but its rows have {num_items} "
            f"pairs; remove it and run the same command again"
        )
    return values
