"""Tables that are computed once and kept: beside a source's shards, or in `data.cache_dir`.

A table's name is the hash of all that it depends on, so it never has to be invalidated. Where the
directory cannot be written, every start computes it. Processes that meet a new source at once would
each compute it: let one go first.
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
    """Read a table where it is kept, else compute it and keep it.

    Args:
        manifest: of the source whose shards it stands beside.
        cache_dir: where it is kept instead.
        name: of the file, by everything that the table depends on.
        compute: gives the table.

    Returns:
        The table, and whether the next start finds it.
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
