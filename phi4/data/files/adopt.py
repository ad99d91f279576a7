"""Adopt a token file that another tool wrote: check it and write its manifest.

Units and windows find documents by the end-of-document token alone, not by the index. A pair whose
documents do not end with it would be read as one long document, so it is refused.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.manifest import (
    ShardManifest,
    encode_manifest,
    file_sha256,
    length_histogram,
    manifest_path,
)
from phi4.data.files.token_file import TokenFile, check_ids
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError

_BLOCK_DOCUMENTS = 1 << 20


def adopt(prefix: str | Path, tokenizer: TokenizerFacts) -> ShardManifest:
    """Write the manifest of a pair that another tool wrote with this tokenizer.

    Raises:
        DataError: the pair is damaged, holds an id outside the vocabulary, or a document that does
            not end with the end-of-document token.
    """
    pair = TokenFile(prefix)
    pair.check_index()
    check_ids(pair.tokens, tokenizer.vocab_size, lambda position: f"{prefix}.bin, token {position}")
    _check_ends(pair, tokenizer.eod_id)
    manifest = ShardManifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        num_documents=pair.num_documents,
        num_tokens=pair.num_tokens,
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        mask_sha256=None if pair.loss_mask is None else file_sha256(f"{prefix}.mask"),
        length_histogram=length_histogram(pair.document_lengths()),
    )
    write_atomically(manifest_path(prefix), encode_manifest(manifest))
    return manifest


def _check_ends(pair: TokenFile, eod_id: int) -> None:
    """Check that documents end with `eod_id`; the index must already have been checked."""
    others: Counter[int] = Counter()
    for begin in range(0, pair.num_documents, _BLOCK_DOCUMENTS):
        bounds = pair.document_bounds[begin : begin + _BLOCK_DOCUMENTS + 1]
        bounds = bounds[np.insert(np.diff(bounds) > 0, 0, True)]  # Some documents have no sequence.
        starts = pair.pointers[bounds[:-1]] // pair.tokens.itemsize
        ends = pair.pointers[bounds[1:] - 1] // pair.tokens.itemsize + pair.lengths[bounds[1:] - 1]
        ids = pair.tokens[ends[ends > starts] - 1]
        values, counts = np.unique(ids[ids != eod_id], return_counts=True)
        others.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    if others:
        ((token, count),) = others.most_common(1)
        raise DataError(
            f"{pair.prefix}: {others.total()} of {pair.num_documents} documents do not end with "
            f"token {eod_id} (end of document), {count} of them end with {token}; phi4 cannot find "
            f"their ends: build the pair again with Megatron's --append-eod and a tokenizer whose "
            f"eod is {eod_id}, or with `phi4 data tokenize`"
        )
