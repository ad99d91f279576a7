"""Adoption of pairs that other tools wrote, and what an index may not say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi4.data.files.adopt import adopt
from phi4.data.files.index_format import HEADER, MAGIC
from phi4.data.files.token_file import TokenFile
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError
from tests.data.test_token_file import FACTS, write, write_with_megatron

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def test_megatron_file_is_adopted_by_a_manifest(tmp_path: Path) -> None:
    prefix = write_with_megatron(tmp_path / "m", [[3, 1, 100_257], [4, 100_257]], np.int32)
    with pytest.raises(DataError, match=f"phi4 data adopt {prefix}"):
        TokenFile(prefix).require_tokenizer(FACTS)
    adopt(prefix, FACTS)
    assert TokenFile(prefix).require_tokenizer(FACTS).num_tokens == 5
    assert TokenFile(prefix).verify().num_documents == 2


def test_adoption_refuses_ids_beyond_the_vocabulary_and_keeps_the_manifest(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p")
    before = Path(f"{prefix}.manifest.json").read_bytes()
    small = TokenizerFacts(vocab_size=100_351, eod_id=1, pad_id=2, fingerprint="b" * 64)
    with pytest.raises(DataError, match=r"token 1: token id 100351 is outside .* of 100351"):
        adopt(prefix, small)
    assert Path(f"{prefix}.manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("documents", "counts"),
    [
        ([[5, 6, 7]] * 20, "20 of 20 documents .* token 100257 .* 20 of them end with 7;"),
        ([[5, 100_265]] * 2 + [[6, 100_257]], "2 of 3 documents .* 2 of them end with 100265;"),
    ],
)
def test_documents_that_do_not_end_with_eod_are_refused(
    tmp_path: Path, documents: list[list[int]], counts: str
) -> None:
    prefix = write_with_megatron(tmp_path / "m", documents, np.int32)
    with pytest.raises(DataError, match=rf"{counts}.*--append-eod") as caught:
        adopt(prefix, FACTS)
    assert "\n" not in str(caught.value)
    assert not Path(f"{prefix}.manifest.json").exists()


def write_index(prefix: Path, change: Callable[..., Columns]) -> str:
    """Forty documents of one sequence of 23 tokens each, under an index with one change."""
    lengths, bounds = np.full(40, 23, "<i4"), np.arange(41).astype("<i8")
    pointers = (92 * np.arange(40)).astype("<i8")
    np.tile(np.r_[np.full(22, 5), FACTS.eod_id], 40).astype("<i4").tofile(f"{prefix}.bin")
    lengths, pointers, bounds = change(lengths, pointers, bounds)
    header = HEADER.pack(MAGIC, 1, 4, 40, bounds.size)
    content = header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    return str(prefix)


def wrong_pointer(lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray) -> Columns:
    pointers[5] = 0
    return lengths, pointers, bounds


def short_length(lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray) -> Columns:
    lengths[5] -= 2
    return lengths, pointers, bounds


def swapped_bounds(lengths: np.ndarray, pointers: np.ndarray, bounds: np.ndarray) -> Columns:
    bounds[[5, 6]] = bounds[[6, 5]]
    return lengths, pointers, bounds


def test_index_without_a_change_is_adopted(tmp_path: Path) -> None:
    prefix = write_index(tmp_path / "p", lambda *columns: columns)
    assert adopt(prefix, FACTS).num_documents == 40
    assert TokenFile(prefix).verify().num_tokens == 920


@pytest.mark.parametrize("block", [1 << 20, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_pointer, "sequence 5 begins at byte 0 .* before it end at byte 460"),
        (short_length, "sequence 6 begins at byte 552 .* before it end at byte 544"),
        (swapped_bounds, "document 5 runs from sequence 6 back to 5"),
    ],
)
def test_index_that_contradicts_itself_is_neither_adopted_nor_verified(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., Columns],
    message: str,
    block: int,
) -> None:
    monkeypatch.setattr("phi4.data.files.token_file._BLOCK_ENTRIES", block)
    prefix = write_index(tmp_path / "p", change)
    with pytest.raises(DataError, match=rf"p\.idx: {message}"):
        adopt(prefix, FACTS)
    monkeypatch.setattr(TokenFile, "check_index", lambda self: None)
    monkeypatch.setattr("phi4.data.files.adopt._check_ends", lambda pair, eod_id: None)
    adopt(prefix, FACTS)
    monkeypatch.undo()
    with pytest.raises(DataError, match=rf"p\.idx: {message}"):
        TokenFile(prefix).verify()


@pytest.mark.parametrize("num_bounds", [21, 1, 0])
def test_bounds_that_end_early_are_refused_when_a_pair_is_opened(
    tmp_path: Path, num_bounds: int
) -> None:
    prefix = write_index(tmp_path / "p", lambda i, p, bounds: (i, p, bounds[:num_bounds]))
    last = max(0, num_bounds - 1)
    with pytest.raises(DataError, match=rf"documents run from sequence 0 to {last} of 40"):
        TokenFile(prefix)


def test_mask_that_the_manifest_does_not_know_fails_verification(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p")
    Path(f"{prefix}.mask").write_bytes(b"\1" * TokenFile(prefix).num_tokens)
    with pytest.raises(DataError, match=r"p\.mask is not in the manifest"):
        TokenFile(prefix).verify()
