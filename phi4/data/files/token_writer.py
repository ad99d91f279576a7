"""Write Megatron's `.bin/.idx` token files.

Tokens are written under a temporary name; after fsync everything is renamed, the manifest last, so
a manifest always belongs to a complete pair.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from phi4.data.files.atomic_files import HashedFile, write_atomically
from phi4.data.files.index_format import index_bytes
from phi4.data.files.manifest import (
    FileKind,
    ShardManifest,
    encode_manifest,
    length_histogram,
    manifest_path,
)
from phi4.data.vocabulary.tokenizer import Tokenizer, TokenizerFacts
from phi4.errors import DataError

LIST_SUFFIX = ".list"
"""A source path with this suffix is a file that lists pairs."""

_SEQUENCES = {"documents": 1, "pairs": 2, "pivots": 4}
_BLOCK_BYTES = 1 << 20


class TokenFileWriter:
    """Writes documents one after another; a context manager that leaves a complete pair or none.

    Existing files of the prefix are replaced when the context ends without an exception.

    Raises:
        DataError: the prefix is invalid, or another process is writing it.
        DiskFullError: the pair does not fit on the disk.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: TokenizerFacts,
        *,
        num_rejected: int = 0,
        shuffle_seed: int | None = None,
        kind: FileKind = "documents",
        chat_template_sha256: str | None = None,
    ) -> None:
        """Set the pair's prefix and the manifest's fields other than the counts."""
        self.prefix = str(prefix)
        self._manifest: ShardManifest | None = None
        self._tokenizer = tokenizer
        self._kind: FileKind = kind
        self._chat_template_sha256 = chat_template_sha256
        self._num_rejected = num_rejected
        self._shuffle_seed = shuffle_seed
        self._sequences = _SEQUENCES[kind]
        self._lengths = array("i")
        self._num_tokens = 0

    def __enter__(self) -> Self:
        check_prefix(self.prefix)
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._content = HashedFile(f"{self.prefix}.bin")
        self._mask: HashedFile | None = None
        return self

    @property
    def manifest(self) -> ShardManifest:
        """What was written; there once the block is left."""
        assert self._manifest is not None, "the writer is still open"
        return self._manifest

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths) // self._sequences

    def describe(self, *, num_rejected: int, chat_template_sha256: str | None) -> None:
        """Set fields known only after all documents have been added; see `ShardManifest`."""
        self._num_rejected, self._chat_template_sha256 = num_rejected, chat_template_sha256

    def add(self, document: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append one document.

        Args:
            document: [n] token ids, the end-of-document token included.
            loss_mask: [n], 1 where the token counts in the loss as a label; None for all.
        """
        self.add_many(document, [len(document)], loss_mask)

    def add_many(
        self, tokens: np.ndarray, lengths: Sequence[int], loss_mask: np.ndarray | None = None
    ) -> None:
        """Append consecutive documents.

        Args:
            tokens: [n] ids.
            lengths: tokens of each document, sum n; of each of its sequences if a document has
                several, see `FileKind`.
            loss_mask: as in `add`.
        """
        self._content.write(np.ascontiguousarray(tokens, dtype="<i4").data)
        if loss_mask is not None and self._mask is None:
            self._mask = HashedFile(f"{self.prefix}.mask")
            for begin in range(0, self._num_tokens, _BLOCK_BYTES):
                self._mask.write(b"\1" * min(_BLOCK_BYTES, self._num_tokens - begin))
        if self._mask is not None:
            mask = np.ones(len(tokens), dtype=np.uint8) if loss_mask is None else loss_mask
            self._mask.write(np.ascontiguousarray(mask, dtype=np.uint8).data)
        self._lengths.extend(lengths)
        self._num_tokens += len(tokens)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        for file in filter(None, (self._content, self._mask)):
            file.discard()

    def _finish(self) -> None:
        lengths = np.array(self._lengths, dtype=np.int32)
        index = index_bytes(lengths, self._sequences)
        self._manifest = ShardManifest(
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            num_documents=self.num_documents,
            num_tokens=self._num_tokens,
            bin_sha256=self._content.finish(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            mask_sha256=self._mask.finish() if self._mask else None,
            length_histogram=length_histogram(
                lengths.reshape(-1, self._sequences).sum(axis=1, dtype=np.int64)
            ),
            kind=self._kind,
            chat_template_sha256=self._chat_template_sha256,
            num_rejected=self._num_rejected,
            shuffle_seed=self._shuffle_seed,
        )
        # Without its old manifest a half-replaced pair cannot be mistaken for a complete one.
        manifest_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.mask").unlink(missing_ok=True)
        for file in filter(None, (self._content, self._mask)):
            file.publish()
        write_atomically(f"{self.prefix}.idx", index)
        write_atomically(manifest_path(self.prefix), encode_manifest(self._manifest))


def write_documents(
    texts: Iterable[str], tokenizer: Tokenizer, prefix: str | Path
) -> ShardManifest:
    """Tokenize a few texts into `PREFIX.bin/.idx`, each followed by the end-of-document token."""
    with TokenFileWriter(prefix, tokenizer.facts) as writer:
        for text in texts:
            writer.add(np.append(tokenizer.encode_array(text), tokenizer.eod_id))
    return writer.manifest


def existing_file(prefix: str | Path) -> str | None:
    """Return an existing file of a prefix, or None."""
    names = (f"{prefix}.bin", f"{prefix}.idx", str(manifest_path(prefix)))
    return next(filter(os.path.exists, names), None)


def check_prefix(prefix: str | Path) -> None:
    """Raise an error for a prefix whose files could not be found again.

    Raises:
        DataError: it is a directory, or a recipe would interpret it as a list of shards.
    """
    name = os.path.basename(str(prefix))
    if name in ("", ".", ".."):
        raise DataError(
            f"{prefix} is a directory; give the path of the pair without a suffix, such as "
            f"{os.path.join(str(prefix), 'web')} for web.bin and web.idx"
        )
    if name.endswith(LIST_SUFFIX):
        raise DataError(
            f"{prefix}: a name ending in {LIST_SUFFIX} is interpreted as a list of shards; give "
            f"another"
        )
