"""The demo's data: corpus, small tokenizer, token files, and the entropy that a model must beat."""

from pathlib import Path

import msgspec
import numpy as np

from phi4.config import TokenizerConfig
from phi4.data.bpe import train_bpe
from phi4.data.corpora import standard_library_corpus
from phi4.data.token_file import TokenFile
from phi4.data.token_writer import write_atomically, write_documents
from phi4.data.tokenizer import load_tokenizer, rank_file_bytes

TRAINING_SOURCES = ("code", "prose")


class SourceReport(msgspec.Struct, frozen=True):
    """Size of one token file."""

    num_documents: int
    num_tokens: int


class CorpusReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `build_demo` wrote; kept as corpus.json."""

    vocab_size: int
    tokenizer_fingerprint: str
    sources: dict[str, SourceReport]
    unigram_entropy_nats: float
    """Loss of the best model that ignores context, on the training tokens."""


def build_demo(out: str | Path, vocab_size: int = 2048) -> CorpusReport:
    """Write bpe.tiktoken, the four token files and corpus.json into a directory.

    Raises:
        DataError: this Python lacks its standard library's sources, or vocab_size does not fit.
    """
    out = Path(out)
    corpus = standard_library_corpus()
    training = (text for name in TRAINING_SOURCES for text in corpus[name])
    ranks = train_bpe(training, vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    rank_file = out / "bpe.tiktoken"
    write_atomically(rank_file, rank_file_bytes(ranks))
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(rank_file)))
    sources = {}
    for name, texts in corpus.items():
        manifest = write_documents(texts, tokenizer, out / name)
        sources[name] = SourceReport(manifest.num_documents, manifest.num_tokens)
    report = CorpusReport(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=sources,
        unigram_entropy_nats=unigram_entropy([out / name for name in TRAINING_SOURCES]),
    )
    content = msgspec.json.format(msgspec.json.encode(report), indent=2)
    write_atomically(out / "corpus.json", content + b"\n")
    return report


def unigram_entropy(prefixes: list[Path]) -> float:
    """Entropy of the token frequencies over some token files, in nats."""
    counts = np.bincount(np.concatenate([TokenFile(prefix).tokens for prefix in prefixes]))
    frequency = counts[counts > 0] / counts.sum()
    return float(-(frequency * np.log(frequency)).sum())
