"""Cache tables that are computed once: next to a source's shards, or in `data.cache_dir`.

A table's name is the hash of all that it depends on, so it never has to be invalidated. If the
directory is not writable, every start recomputes it. Concurrent processes would each compute a new
table, so the caller should let one go first.
"""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from phi4.data.files.atomic_files import write_atomically
from phi4.data.stream.sources import SourceManifest


def kept_table(
    manifest: SourceManifest, cache_dir: str | None, name: str, compute: Callable[[], np.ndarray]
) -> tuple[np.ndarray, bool]:
    """Read a cached table, or compute and store it.

    Args:
        manifest: manifest of the source; the table is stored next to its shards.
        cache_dir: directory to use instead.
        name: file name, derived from everything that the table depends on.
        compute: computes the table.

    Returns:
        The table, and whether it is stored.
    """
    directory = Path(cache_dir or Path(manifest.shards[0].prefix).parent)
    kept = directory / name
    if kept.exists():
        return np.load(kept, mmap_mode="r").view(np.ndarray), True
    table = compute()
    can_write = os.access(directory, os.W_OK)
    if can_write:
        stream = BytesIO()
        np.save(stream, table)
        write_atomically(kept, stream.getvalue())
    return table, can_write
