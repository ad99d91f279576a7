"""Read Megatron's `.bin/.idx` token files.

`.bin` is one flat array of token ids; `.idx` has the bounds of sequences and documents. Both are
memory-mapped: opening compares sizes with the header and reads no token, in constant time and
memory for any number of documents.
"""

import mmap
import os
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np

from phi4.data.files.index_format import HEADER, check_index_size, read_header
from phi4.data.files.manifest import ShardManifest, file_sha256, manifest_path, read_manifest
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError

_BLOCK_ENTRIES = 1 << 20


class TokenFile:
    """An open `.bin/.idx` pair.

    Attributes:
        prefix: path without `.bin`.
        tokens: [num_tokens], int32 or uint16, memory-mapped.
        lengths: [num_sequences], int32, tokens per sequence.
        pointers: [num_sequences], int64, byte offset of each sequence in `.bin`.
        document_bounds: [num_documents + 1], int64, first sequence of each document.
        loss_mask: [num_tokens], uint8, 1 where the token counts in the loss as a label; None for
            all.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a pair.

        Raises:
            DataError: a file is missing, truncated or of another format.
        """
        self.prefix = str(prefix)
        index = _map_bytes(Path(f"{prefix}.idx"))
        (header,) = _read_at(f"{prefix}.idx", [(0, HEADER.size)])
        dtype, num_sequences, num_bounds = read_header(header, f"{prefix}.idx")
        sizes = (HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_bounds)
        split = list(accumulate(sizes))
        check_index_size(index.size, split[-1], num_sequences, f"{prefix}.idx")
        self.lengths = index[split[0] : split[1]].view("<i4")
        self.pointers = index[split[1] : split[2]].view("<i8")
        self.document_bounds = index[split[2] : split[3]].view("<i8")
        content = _map_bytes(Path(f"{prefix}.bin"))
        self._check_content(content.size, dtype.itemsize, split)
        self.tokens = content.view(dtype)
        self.loss_mask = _map_mask(Path(f"{prefix}.mask"), self.tokens.size)

    @property
    def num_tokens(self) -> int:
        """Tokens in the pair, end-of-document tokens included."""
        return self.tokens.size

    @property
    def num_documents(self) -> int:
        """Documents in the pair."""
        return max(0, self.document_bounds.size - 1)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document."""
        return self.tokens[self._span(index)]

    def sequences(self, index: int, values: np.ndarray | None = None) -> list[np.ndarray]:
        """Return the tokens of each sequence of one document, or parallel values.

        Args:
            index: index of the document.
            values: [num_tokens], such as the loss mask; None for the tokens.
        """
        first, last = (int(self.document_bounds[index + i]) for i in (0, 1))
        begin = int(self.pointers[first]) // self.tokens.itemsize
        ends = begin + np.cumsum(self.lengths[first:last], dtype=np.int64)
        values = self.tokens if values is None else values
        return [values[a:b] for a, b in pairwise([begin, *ends.tolist()])]

    def num_loss_labels(self, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Count labels in the loss in ranges of tokens.

        Args:
            begins: [n] first tokens, ascending.
            sizes: [n] labels, each the token that follows; at least 1.

        Returns:
            [n] int64.
        """
        if self.loss_mask is None or not sizes.size:
            return sizes
        # Sums of all ranges between consecutive bounds; every other one is needed.
        bounds = np.stack([begins + 1, begins + 1 + sizes], axis=1).reshape(-1)
        bounds = bounds if bounds[-1] < self.num_tokens else bounds[:-1]
        return np.add.reduceat(self.loss_mask, bounds, dtype=np.int64)[::2]

    def document_mask(self, index: int) -> np.ndarray:
        """Return the loss mask of one document, as long as its tokens; uint8."""
        span = self._span(index)
        if self.loss_mask is None:
            return np.ones(span.stop - span.start, np.uint8)
        return self.loss_mask[span]

    def document_lengths(self) -> np.ndarray:
        """Return the number of tokens of each document, [num_documents] int64."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.document_bounds])

    def locate(self, position: int) -> tuple[int, int]:
        """Return the document that holds a token position, and the offset inside the document."""
        pointers = np.asarray(self.pointers)
        sequence = np.searchsorted(pointers, position * self.tokens.itemsize, side="right") - 1
        document = int(np.searchsorted(self.document_bounds, sequence, side="right")) - 1
        start = int(pointers[self.document_bounds[document]]) // self.tokens.itemsize
        return document, position - start

    def manifest(self) -> ShardManifest:
        """Return the manifest of the pair.

        Raises:
            DataError: there is none, or its counts differ from the pair's.
        """
        manifest = read_manifest(self.prefix)
        if manifest is None:
            raise DataError(
                f"{manifest_path(self.prefix)} does not exist, so the tokenizer of "
                f"{self.prefix}.bin is unknown; write it with `phi4 data adopt {self.prefix}`"
            )
        found = (self.num_documents, self.num_tokens)
        expected = (manifest.num_documents, manifest.num_tokens)
        if found != expected:
            raise DataError(
                f"{self.prefix}.bin/.idx hold {found[0]} documents and {found[1]} tokens, but the "
                f"manifest has {expected[0]} and {expected[1]}; tokenize again or run `phi4 data "
                f"adopt`"
            )
        return manifest

    def require_tokenizer(self, tokenizer: TokenizerFacts) -> ShardManifest:
        """Return the manifest after checking that this tokenizer wrote the ids.

        Raises:
            DataError: no manifest, or one of another tokenizer.
        """
        manifest = self.manifest()
        found, expected = manifest.tokenizer_fingerprint, tokenizer.fingerprint
        if found != expected:
            raise DataError(
                f"{self.prefix}.bin was written by tokenizer {found[:12]}, but the recipe's is "
                f"{expected[:12]}; tokenize the source again or set its tokenizer in the recipe"
            )
        return manifest

    def verify(self) -> ShardManifest:
        """Compare the files with the checksums of the manifest, and check the entire index.

        Raises:
            DataError: no manifest, a file that differs from it, or a wrong index.
        """
        manifest = self.manifest()
        if self.loss_mask is not None and manifest.mask_sha256 is None:
            raise DataError(
                f"{self.prefix}.mask is not in the manifest, so training would refuse the pair; "
                f"remove the file if it does not belong to it, or run `phi4 data adopt`"
            )
        checksums = {"bin": manifest.bin_sha256, "idx": manifest.idx_sha256}
        if manifest.mask_sha256 is not None:
            checksums["mask"] = manifest.mask_sha256
        for suffix, expected in checksums.items():
            found = file_sha256(f"{self.prefix}.{suffix}")
            if found != expected:
                raise DataError(
                    f"{self.prefix}.{suffix}: sha256 is {found}, but the manifest has {expected}; "
                    f"the file was changed: copy it again or tokenize again"
                )
        self.check_index()
        return manifest

    def check_index(self) -> None:
        """Check that the index describes every token exactly once, in order; reads all of it.

        Opening a pair checks only its first and last entries, in constant time.

        Raises:
            DataError: names the first invalid sequence or document.
        """
        size, offset = self.tokens.itemsize, 0
        for begin in range(0, self.lengths.size, _BLOCK_ENTRIES):
            lengths = self.lengths[begin : begin + _BLOCK_ENTRIES].astype(np.int64)
            ends = offset + size * np.cumsum(lengths)
            pointers = self.pointers[begin : begin + _BLOCK_ENTRIES]
            wrong = np.flatnonzero((pointers != ends - size * lengths) | (lengths < 0))
            if wrong.size:
                self._refuse_index(
                    f"sequence {begin + wrong[0]} begins at byte {pointers[wrong[0]]} and has "
                    f"{lengths[wrong[0]]} tokens, the ones before it end at byte "
                    f"{(ends - size * lengths)[wrong[0]]}"
                )
            offset = int(ends[-1])
        for begin in range(0, self.num_documents, _BLOCK_ENTRIES):
            bounds = self.document_bounds[begin : begin + _BLOCK_ENTRIES + 1]
            wrong = np.flatnonzero(np.diff(bounds) < 0)
            if wrong.size:
                first, last = bounds[wrong[0] : wrong[0] + 2]
                self._refuse_index(
                    f"document {begin + wrong[0]} runs from sequence {first} back to {last}"
                )

    def _span(self, index: int) -> slice:
        first, last = (int(self.document_bounds[index + i]) for i in (0, 1))
        start = int(self.pointers[first]) // self.tokens.itemsize
        return slice(start, start + int(self.lengths[first:last].sum()))

    def _refuse_index(self, what: str) -> NoReturn:
        raise DataError(f"{self.prefix}.idx: {what}; the index is damaged: build the pair again")

    def _check_content(self, found_bytes: int, itemsize: int, split: list[int]) -> None:
        """Compare sizes with the last sequence and document; `split` is the offset of the
        columns."""
        ends = [(split[1] - 4, 4), (split[2] - 8, 8), (split[2], 8), (split[3] - 8, 8)]
        read = _read_at(f"{self.prefix}.idx", ends)
        length, pointer, first, last = (int.from_bytes(b, "little", signed=True) for b in read)
        expected = pointer + length * itemsize if self.lengths.size else 0
        if found_bytes != expected:
            raise DataError(
                f"{self.prefix}.bin has {found_bytes} bytes, but its .idx describes {expected}; "
                f"the pair is truncated or the files do not belong together: copy both again or "
                f"tokenize again"
            )
        if not self.document_bounds.size:
            first, last = 0, 0
        if (first, last) != (0, self.lengths.size):
            self._refuse_index(
                f"documents run from sequence {first} to {last} of {self.lengths.size}"
            )


def check_ids(ids: np.ndarray, vocab_size: int, locate: Callable[[int], str]) -> None:
    """Check that all ids are inside the vocabulary.

    Args:
        ids: integer array of any shape.
        vocab_size: ids must be in [0, vocab_size).
        locate: describes the origin of the id at a flat position.

    Raises:
        DataError: names the first such id and its origin.
    """
    # A negative int32 is a huge uint32, so one maximum finds both kinds.
    unsigned = ids.view(np.uint32) if ids.dtype.kind == "i" else ids
    if unsigned.size and int(unsigned.max()) >= vocab_size:
        position = int(np.flatnonzero(unsigned.reshape(-1) >= vocab_size)[0])
        raise DataError(
            f"{locate(position)}: token id {int(ids.reshape(-1)[position])} is outside the "
            f"vocabulary of {vocab_size}; tokenize the source with the recipe's tokenizer"
        )


def _map_bytes(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                return np.empty(0, dtype=np.uint8)
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype=np.uint8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); the prefix of a source is its path "
            "without .bin"
        ) from None


def _read_at(path: str, places: list[tuple[int, int]]) -> list[bytes]:
    """Read some bytes at (offset, size): touching a byte of a mapping may map 2 MB."""
    with open(path, "rb") as stream:
        return [os.pread(stream.fileno(), size, offset) for offset, size in places]


def _map_mask(path: Path, num_tokens: int) -> np.ndarray | None:
    if not path.exists():
        return None
    mask = _map_bytes(path)
    if mask.size != num_tokens:
        raise DataError(
            f"{path} has {mask.size} tokens, but its .bin has {num_tokens}; tokenize again"
        )
    return mask
