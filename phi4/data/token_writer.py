"""Writer of Megatron's `.bin/.idx` token files.

Tokens stream to a temporary name; after fsync everything is renamed, the manifest last, so a
manifest always stands for a complete pair.
"""

import hashlib
import os
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from phi4.data.manifest import Manifest, encode_manifest, file_sha256, manifest_path
from phi4.data.token_file import TokenFile, check_ids, index_bytes
from phi4.data.tokenizer import TokenizerFacts


class TokenFileWriter:
    """Writes documents one after another; a context manager that leaves all or nothing.

    Files that stand under the prefix are replaced when the context ends without an exception.
    """

    def __init__(self, prefix: str | Path, tokenizer: TokenizerFacts) -> None:
        self.prefix = str(prefix)
        self.manifest: Manifest | None = None
        self._tokenizer = tokenizer
        self._lengths = array("i")
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._content = open(_temporary(f"{self.prefix}.bin"), "wb", buffering=1 << 20)
        return self

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, document: np.ndarray) -> None:
        """Append one document, [n] token ids with the end-of-document token included."""
        content = np.ascontiguousarray(document, dtype="<i4").data
        self._content.write(content)
        self._digest.update(content)
        self._lengths.append(len(document))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
            return
        self._content.close()
        os.unlink(self._content.name)

    def _finish(self) -> None:
        lengths = np.array(self._lengths, dtype=np.int32)
        index = index_bytes(lengths)
        self.manifest = Manifest(
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            num_documents=lengths.size,
            num_tokens=int(lengths.sum(dtype=np.int64)),
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
        _sync_and_close(self._content)
        # Without its old manifest a half-replaced pair cannot pass for a complete one.
        manifest_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._content.name, f"{self.prefix}.bin")
        write_atomically(f"{self.prefix}.idx", index)
        write_atomically(manifest_path(self.prefix), encode_manifest(self.manifest))


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that its name only ever stands for the whole of it."""
    with open(_temporary(path), "wb") as stream:
        stream.write(content)
        _sync_and_close(stream)
    os.replace(stream.name, path)
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
    )
    write_atomically(manifest_path(prefix), encode_manifest(manifest))
    return manifest


def _temporary(path: str | Path) -> str:
    return f"{path}.partial-{os.getpid()}"


def _sync_and_close(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
