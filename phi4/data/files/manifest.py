"""The manifest of a token file: tokenizer, counts and checksums.

A `.bin/.idx` pair does not record which tokenizer wrote it. The manifest does, with counts and
checksums, in a few lines of JSON that checkpoints refer to by hash.
"""

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from phi4.errors import DataError

FileKind = Literal["documents", "pairs", "pivots"]
"""Structure of a document. documents: one text or conversation. pairs: two sequences, prompt with
the chosen and with the rejected answer. pivots: four sequences, a trajectory, positions in it, and
the chosen and the rejected id that may follow each of them."""


class ShardManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metadata of one `.bin/.idx` pair."""

    format_version: int = 1
    kind: FileKind = "documents"
    chat_template_sha256: str | None = None
    """Hash of the chat format of the answers; None for text and for given ids."""
    tokenizer_fingerprint: str
    vocab_size: int
    num_documents: int
    num_tokens: int
    bin_sha256: str
    idx_sha256: str
    mask_sha256: str | None = None
    """Hash of the loss mask, if it excludes some tokens."""
    length_histogram: tuple[int, ...] = ()
    """Entry k counts the documents of 2^k to 2^(k+1) - 1 tokens."""
    num_rejected: int = 0
    """Rows listed in PREFIX.rejected.jsonl."""
    shuffle_seed: int | None = None
    """Seed of the order of the documents; None for the order of the inputs."""


def manifest_path(prefix: str | Path) -> Path:
    """Return the path of the manifest of `PREFIX.bin`."""
    return Path(f"{prefix}.manifest.json")


def length_histogram(lengths: np.ndarray) -> tuple[int, ...]:
    """Count documents by the power of two below their length; [n] lengths, 0 counts as 1."""
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    return tuple(np.bincount(exponents).tolist())


def encode_manifest(manifest: msgspec.Struct) -> bytes:
    """Encode a manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def read_manifest(prefix: str | Path) -> ShardManifest | None:
    """Read the manifest of a pair; None if there is none.

    Raises:
        DataError: the file exists but is not a manifest.
    """
    path = manifest_path(prefix)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ShardManifest)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError) as error:
        raise DataError(
            f"{path} is not a manifest of phi4 ({error}); write it again with `phi4 data adopt`"
        ) from None


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, read in blocks.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
