"""Writer of Megatron's `.bin/.idx` token files.

Tokens stream to a temporary name; after fsync everything is renamed, the manifest last, so a
manifest always stands for a complete pair.
"""

import hashlib
import os
import secrets
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from phi4.data.manifest import (
    Manifest,
    encode_manifest,
    file_sha256,
    length_histogram,
    manifest_path,
)
from phi4.data.token_file import TokenFile, check_ids, index_bytes
from phi4.data.tokenizer import Tokenizer, TokenizerFacts

_BLOCK_BYTES = 1 << 20


class TokenFileWriter:
    """Writes documents one after another; a context manager that leaves all or nothing.

    Files that stand under the prefix are replaced when the context ends without an exception.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: TokenizerFacts,
        *,
        num_rejected: int = 0,
        shuffle_seed: int | None = None,
    ) -> None:
        """Name the pair and what its manifest says beside the counts."""
        self.prefix = str(prefix)
        self.manifest: Manifest | None = None
        self._tokenizer = tokenizer
        self._notes = {"num_rejected": num_rejected, "shuffle_seed": shuffle_seed}
        self._lengths = array("i")
        self._num_tokens = 0

    def __enter__(self) -> Self:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._content = _HashedFile(f"{self.prefix}.bin")
        self._mask: _HashedFile | None = None
        return self

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, document: np.ndarray, learnt: np.ndarray | None = None) -> None:
        """Append one document.

        Args:
            document: [n] token ids, the end-of-document token included.
            learnt: [n], 1 where the token is learnt as a label; None learns all.
        """
        self.add_many(document, [len(document)], learnt)

    def add_many(
        self, tokens: np.ndarray, lengths: Sequence[int], learnt: np.ndarray | None = None
    ) -> None:
        """Append documents that stand one after another.

        Args:
            tokens: [n] ids.
            lengths: tokens of each document, sum n.
            learnt: as in `add`.
        """
        self._content.write(np.ascontiguousarray(tokens, dtype="<i4").data)
        if learnt is not None and self._mask is None:
            self._mask = _HashedFile(f"{self.prefix}.mask")
            for begin in range(0, self._num_tokens, _BLOCK_BYTES):
                self._mask.write(b"\1" * min(_BLOCK_BYTES, self._num_tokens - begin))
        if self._mask is not None:
            mask = np.ones(len(tokens), dtype=np.uint8) if learnt is None else learnt
            self._mask.write(np.ascontiguousarray(mask, dtype=np.uint8).data)
        self._lengths.extend(lengths)
        self._num_tokens += len(tokens)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
            return
        for file in filter(None, (self._content, self._mask)):
            file.discard()

    def _finish(self) -> None:
        lengths = np.array(self._lengths, dtype=np.int32)
        index = index_bytes(lengths)
        self.manifest = Manifest(
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            num_documents=lengths.size,
            num_tokens=self._num_tokens,
            bin_sha256=self._content.finish(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            mask_sha256=self._mask.finish() if self._mask else None,
            length_histogram=length_histogram(lengths),
            **self._notes,
        )
        # Without its old manifest a half-replaced pair cannot pass for a complete one.
        manifest_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.mask").unlink(missing_ok=True)
        for file in filter(None, (self._content, self._mask)):
            file.publish()
        write_atomically(f"{self.prefix}.idx", index)
        write_atomically(manifest_path(self.prefix), encode_manifest(self.manifest))


class _HashedFile:
    """A file under a temporary name, and the sha256 of what was written."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stream = open(_temporary(path), "wb", buffering=_BLOCK_BYTES)  # noqa: SIM115
        self._digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        self._stream.write(content)
        self._digest.update(content)

    def finish(self) -> str:
        """The checksum, once the content is on the disk."""
        _sync_and_close(self._stream)
        return self._digest.hexdigest()

    def publish(self) -> None:
        os.replace(self._stream.name, self._path)

    def discard(self) -> None:
        self._stream.close()
        os.unlink(self._stream.name)


def write_documents(texts: Iterable[str], tokenizer: Tokenizer, prefix: str | Path) -> Manifest:
    """Tokenize a few texts into `PREFIX.bin/.idx`, each closed by the end-of-document token."""
    with TokenFileWriter(prefix, tokenizer.facts) as writer:
        for text in texts:
            writer.add(np.append(tokenizer.encode_array(text), tokenizer.eod_id))
    return writer.manifest


def write_atomically(
    path: str | Path, content: bytes | memoryview, *, sync_name: bool = True
) -> None:
    """Write a file so that its name only ever stands for the whole of it.

    Args:
        path: replaced if it exists.
        content: of the file, on the disk when this returns.
        sync_name: whether its name is, too; the next file in the directory whose name is synced
            brings it along.
    """
    with open(_temporary(path), "wb") as stream:
        stream.write(content)
        _sync_and_close(stream)
    os.replace(stream.name, path)
    if not sync_name:
        return
    directory = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def adopt(prefix: str | Path, tokenizer: TokenizerFacts) -> Manifest:
    """Write the manifest of a pair that another tool wrote with this tokenizer.

    Raises:
        DataError: the pair is damaged, or holds an id outside the vocabulary.
    """
    pair = TokenFile(prefix)
    check_ids(pair.tokens, tokenizer.vocab_size, lambda position: f"{prefix}.bin, token {position}")
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        num_documents=pair.num_documents,
        num_tokens=pair.num_tokens,
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        mask_sha256=None if pair.learnt is None else file_sha256(f"{prefix}.mask"),
        length_histogram=length_histogram(pair.document_lengths()),
    )
    write_atomically(manifest_path(prefix), encode_manifest(manifest))
    return manifest


def _temporary(path: str | Path) -> str:
    # Processes of several machines may write one name; their ids may be equal.
    return f"{path}.partial-{secrets.token_hex(6)}"


def _sync_and_close(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
