import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError

FACTS = TokenizerFacts(vocab_size=100_352, eod_id=100_257, pad_id=100_349, fingerprint="a" * 64)
DOCUMENTS = [[5, 100_351, 100_257], [100_257], list(range(1000)), [7, 100_257]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS) -> str:
    with TokenFileWriter(prefix, FACTS) as writer:
        for document in documents:
            writer.add(np.array(document))
    return str(prefix)


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        # Two sequences per document: the formats must agree on what a document is.
        builder.add_document(document, [1, len(document) - 1])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 100_352, length).tolist() for length in lengths]
    pair = TokenFile(write(tmp_path_factory.mktemp("pair") / "p", documents))
    assert [pair.document(i).tolist() for i in range(pair.num_documents)] == documents
    assert pair.tokens.tolist() == list(chain.from_iterable(documents))
    assert pair.document_lengths().tolist() == lengths
    places = [(i, j) for i, length in enumerate(lengths) for j in range(length)]
    assert [pair.locate(position) for position in range(pair.num_tokens)] == places


def test_megatron_opens_ours(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "p"))
    assert dataset.index.dtype == np.int32
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_we_open_what_megatron_wrote(tmp_path: Path, dtype: type) -> None:
    documents = [[3, 1, 2], [60_000, 5], [9] * 70]
    pair = TokenFile(write_with_megatron(tmp_path / "m", documents, dtype))
    assert pair.tokens.dtype == dtype
    assert [pair.document(i).tolist() for i in range(pair.num_documents)] == documents
    assert pair.locate(4) == (1, 1)
    assert pair.lengths.size == 6


def cut(path: str, num_bytes: int) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:num_bytes])


def overwrite(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


DAMAGES = {
    "missing bin": (lambda p: Path(f"{p}.bin").unlink(), r"p\.bin cannot be read"),
    "missing idx": (lambda p: Path(f"{p}.idx").unlink(), r"p\.idx cannot be read"),
    "truncated bin": (lambda p: cut(f"{p}.bin", 401), r"p\.bin has 401 bytes, .* 4024"),
    "empty bin": (lambda p: cut(f"{p}.bin", 0), r"p\.bin has 0 bytes, .* 4024"),
    "truncated idx": (lambda p: cut(f"{p}.idx", 100), r"p\.idx has 100 bytes, .* describes 122"),
    "idx without header": (lambda p: cut(f"{p}.idx", 20), "not a Megatron index"),
    "foreign idx": (lambda p: overwrite(f"{p}.idx", 0, b"TNTIDX"), "not a Megatron index"),
    "unknown version": (lambda p: overwrite(f"{p}.idx", 9, b"\x02"), "version 2"),
    "float ids": (lambda p: overwrite(f"{p}.idx", 17, b"\x06"), "dtype code 6"),
    "absurd counts": (
        lambda p: overwrite(f"{p}.idx", 18, struct.pack("<Q", (1 << 63) + 4)),
        r"p\.idx has 122 bytes",
    ),
    "foreign documents": (
        lambda p: overwrite(f"{p}.idx", 122 - 8, struct.pack("<Q", 9)),
        "run from sequence 0 to 9 of 4",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pair_is_one_clear_line(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    prefix = write(tmp_path / "p")
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        TokenFile(prefix)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    pair = TokenFile(write(tmp_path / "p"))
    other = TokenizerFacts(vocab_size=100_352, eod_id=1, pad_id=2, fingerprint="b" * 64)
    with pytest.raises(DataError, match=r"by tokenizer a{12}, but the recipe's is b{12}"):
        pair.require_tokenizer(other)


def test_manifest_of_another_pair_is_refused(tmp_path: Path) -> None:
    prefix, other = write(tmp_path / "p"), write(tmp_path / "q", [[1, 2]])
    Path(f"{other}.manifest.json").rename(f"{prefix}.manifest.json")
    with pytest.raises(DataError, match=r"hold 4 documents and 1006 tokens, .* 1 and 2"):
        TokenFile(prefix).manifest()


def test_unreadable_manifest(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p")
    Path(f"{prefix}.manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(DataError, match="not a manifest"):
        TokenFile(prefix).manifest()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_flipped_bit_fails_verification(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "p")
    TokenFile(prefix).verify()
    # In .idx: the byte pointer of the second document, which opening does not look at.
    overwrite(f"{prefix}.{suffix}", 34 + 16 + 8, b"\x01")
    with pytest.raises(DataError, match=rf"p\.{suffix}: sha256"):
        TokenFile(prefix).verify()


def test_failed_writing_leaves_the_old_pair_and_nothing_else(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), TokenFileWriter(prefix, FACTS) as writer:
        writer.add(np.array([1, 2, 3]))
        raise RuntimeError("no more input")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_interrupted_replacement_never_passes_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "p", [[1, 2], [3, 4]])
    monkeypatch.setattr("phi4.data.files.token_writer.write_atomically", _killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "p", [[5], [6, 7, 8]])
    # The new .bin under the old .idx: sizes agree, only the missing manifest tells.
    assert TokenFile(prefix).document(0).tolist() == [5, 6]
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        TokenFile(prefix).require_tokenizer(FACTS)


def _killed(path: object, content: bytes) -> None:
    raise KeyboardInterrupt
