"""The files of a reference cache: what it was computed for, and its arrays.

CACHE/
  references.json        what it was computed for, written last; unfinished.json until then
  NAME.items.npy         64 bits of the content of each item of a source, [items] uint64
  NAME.log_probs.npy     chosen and rejected side of each item, [items, 2] float64
"""

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import quote

import msgspec
import numpy as np

from phi4.data.files.manifest import read_manifest
from phi4.data.stream.sources import SourceManifest
from phi4.errors import DataError

FINISHED, UNFINISHED = "references.json", "unfinished.json"


class SourceReferences(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a cache was computed for in one source; items are pairs or pivots."""

    num_items: int
    chat_templates: tuple[str | None, ...]
    """sha256 of the chat formats of its shards, None for text and ids; each once, in order."""
    items_sha256: str
    """Hash of the hashes of all items."""
    log_probs_sha256: str = ""
    """Hash of the log-probabilities; empty while the cache is unfinished."""


class ReferenceManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model and sources that a cache was computed for."""

    format_version: Literal[1] = 1
    dtype: str
    """`precision.dtype` of the reference model."""
    weights: dict[str, str]
    """Global name of each tensor of the reference model -> sha256 of its bytes."""
    checkpoint: str = ""
    """Checkpoint of the weights; empty for weights initialised from a seed."""
    checkpoint_manifest_sha256: str = ""
    sources: dict[str, SourceReferences]


class PreferenceItems(Protocol):
    """What the cache needs from a source of pairs or pivots; see
    `phi4.data.stream.stream.Source`."""

    name: str
    num_items: int
    manifest: SourceManifest

    def item_hashes(self) -> np.ndarray:
        """Return 64-bit content hashes of the items, [num_items] uint64; reads all shards."""

    def locate_item(self, item: int) -> str:
        """Describe source, file and document of an item in words."""


def array_path(directory: Path, source_name: str, what: Literal["items", "log_probs"]) -> Path:
    """Return the path of an array of a source."""
    return directory / f"{quote(source_name, safe='')}.{what}.npy"


def array_bytes(values: np.ndarray) -> bytes:
    """Content of a .npy file."""
    stream = BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


def array_sha256(values: np.ndarray) -> str:
    """sha256 of the values of an array, little-endian."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.data).hexdigest()


def chat_templates(manifest: SourceManifest) -> tuple[str | None, ...]:
    """Return hashes of the chat formats of a source's shards, each once.

    Raises:
        DataError: a shard has no manifest.
    """
    found = []
    for shard in manifest.shards:
        written = read_manifest(shard.prefix)
        if written is None:
            raise DataError(f"{shard.prefix} has no manifest; write it with `phi4 data adopt`")
        found.append(written.chat_template_sha256)
    return tuple(dict.fromkeys(found))


def source_references(source: PreferenceItems, item_hashes: np.ndarray) -> SourceReferences:
    """Return the entry of a source in the manifest of an unfinished cache.

    Raises:
        DataError: see `chat_templates`.
    """
    return SourceReferences(
        num_items=source.num_items,
        chat_templates=chat_templates(source.manifest),
        items_sha256=array_sha256(item_hashes),
    )
