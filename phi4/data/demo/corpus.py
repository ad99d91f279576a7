"""Build the demo's data: corpus, small tokenizer, token files, and the unigram entropy as a
baseline."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from phi4.config import TokenizerConfig
from phi4.data.demo.corpora import PHI4_SHARES, phi4_corpus
from phi4.data.demo.post_training import write_post_training
from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.manifest import ShardManifest
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter, write_documents
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer, rank_file_bytes

TRAINING_SOURCES = tuple(PHI4_SHARES)


class SourceReport(msgspec.Struct, frozen=True):
    """Size of one token file."""

    num_documents: int
    num_tokens: int


class CorpusReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `build_demo`; stored as corpus.json."""

    vocab_size: int
    tokenizer_fingerprint: str
    sources: dict[str, SourceReport]
    unigram_entropy_nats: float
    """Loss of the best model that ignores context, on the training tokens of the blend."""


def build_demo(out: str | Path, vocab_size: int = 2048) -> CorpusReport:
    """Write bpe.tiktoken, the token files of every source and corpus.json into a directory.

    Sources are those of pretraining; for post-training `chats`, `preferences` and `pivots`; and
    `garbage`, the documents of `web` with their tokens shuffled, which a data mixture ablation must
    distinguish from the others.

    Raises:
        DataError: this Python lacks its standard library's sources, or vocab_size does not fit.
    """
    out = Path(out)
    corpus = phi4_corpus()
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
    garbage = _write_shuffled(corpus["web"], tokenizer, out / "garbage")
    sources["garbage"] = SourceReport(garbage.num_documents, garbage.num_tokens)
    exercises = {side: corpus[f"synthetic{side}"] for side in ("", "_held_out")}
    for name, manifest in write_post_training(out, exercises, tokenizer).items():
        sources[name] = SourceReport(manifest.num_documents, manifest.num_tokens)
    report = CorpusReport(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=sources,
        unigram_entropy_nats=unigram_entropy(
            {out / name: share for name, share in PHI4_SHARES.items()}
        ),
    )
    content = msgspec.json.format(msgspec.json.encode(report), indent=2)
    write_atomically(out / "corpus.json", content + b"\n")
    return report


def _write_shuffled(texts: Sequence[str], tokenizer: Tokenizer, prefix: Path) -> ShardManifest:
    """Write the documents with their tokens shuffled: same frequencies, no meaning."""
    draw = np.random.default_rng(0)
    with TokenFileWriter(prefix, tokenizer.facts) as writer:
        for text in texts:
            ids = draw.permutation(tokenizer.encode_array(text))
            writer.add(np.append(ids, tokenizer.eod_id))
    return writer.manifest


def unigram_entropy(weights: dict[Path, float]) -> float:
    """Entropy of the token frequencies of a blend of token files, in nats.

    Args:
        weights: prefix to its fraction of the blend, sum 1.
    """
    counts = {prefix: np.bincount(TokenFile(prefix).tokens) for prefix in weights}
    frequency = np.zeros(max(count.size for count in counts.values()))
    for prefix, weight in weights.items():
        frequency[: counts[prefix].size] += weight * counts[prefix] / counts[prefix].sum()
    frequency = frequency[frequency > 0]
    return float(-(frequency * np.log(frequency)).sum())
