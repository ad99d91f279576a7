"""A tokenizer of the 256 bytes, and sources of its tokens: the least that a run trains on."""

from pathlib import Path

import numpy as np

from phi4.config import TokenizerConfig
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.vocabulary.tokenizer import TokenizerFacts, load_tokenizer, rank_file_bytes


def write_byte_tokenizer(directory: Path) -> TokenizerFacts:
    """Write `bpe.tiktoken`; gives what is known of it."""
    path = directory / "bpe.tiktoken"
    path.write_bytes(rank_file_bytes({bytes([i]): i for i in range(256)}))
    return load_tokenizer(TokenizerConfig(kind="bpe", path=str(path))).facts


def write_byte_source(directory: Path, ids: np.ndarray) -> None:
    """Write the tokenizer, and the source `tokens` of one document with these ids."""
    with TokenFileWriter(directory / "tokens", write_byte_tokenizer(directory)) as writer:
        writer.add(ids)
