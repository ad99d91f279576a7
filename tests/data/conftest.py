"""Token files whose ids say where they came from."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from phi4.config import TokenizerConfig
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import TokenizerFacts, rank_file_bytes

EOD, PAD, FIRST_ID = 0, 1, 2
FACTS = TokenizerFacts(vocab_size=1 << 30, eod_id=EOD, pad_id=PAD, fingerprint="f" * 64)

WriteSource = Callable[[str, Sequence[int], int], str]


def write_numbered(prefix: Path, document_lengths: Sequence[int], first_id: int) -> str:
    """Documents of ids that count up from first_id, each closed by EOD (included in its length)."""
    next_id = first_id
    with TokenFileWriter(prefix, FACTS) as writer:
        for length in document_lengths:
            document = np.arange(next_id, next_id + length)
            document[-1] = EOD
            next_id += length
            writer.add(document)
    return str(prefix)


@pytest.fixture
def facts() -> TokenizerFacts:
    return FACTS


@pytest.fixture
def write_source(tmp_path: Path) -> WriteSource:
    def write(name: str, document_lengths: Sequence[int], first_id: int = FIRST_ID) -> str:
        return write_numbered(tmp_path / name, document_lengths, first_id)

    return write


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A small vocabulary."""
    path = tmp_path_factory.mktemp("ranks") / "bpe.tiktoken"
    path.write_bytes(rank_file_bytes(train_bpe(["the cat sat on the mat\n"] * 3, 360)))
    return TokenizerConfig(kind="bpe", path=str(path))


@pytest.fixture(scope="session")
def cl100k_file() -> Path:
    """cl100k_base.tiktoken from TIKTOKEN_CACHE_DIR or beside the repository."""
    names = ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
    root = Path(__file__).parents[2]
    directories = [os.environ.get("TIKTOKEN_CACHE_DIR"), root.parent / "shared" / "data"]
    for directory in filter(None, directories):
        for name in names:
            if (Path(directory) / name).is_file():
                return Path(directory) / name
    pytest.skip("cl100k_base.tiktoken is neither in TIKTOKEN_CACHE_DIR nor in ../shared/data")
