import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.stream.batch import Batch
from phi4.data.stream.loader import Loader
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError

EOD, PAD = 0, 1
fixture_is_only_a_writer = settings(max_examples=40)


def windows(path: str, row_tokens: int, unit: int | None = None, **source) -> DataConfig:
    config = SourceConfig(name="long", path=path, kind="windows", **source)
    return DataConfig(sequence_length=row_tokens, unit_tokens=unit or row_tokens, sources=(config,))


def epoch(loader: Loader) -> Batch:
    num_rows = loader.state()["sources"]["long"]["num_units"]
    (batch,) = loader.next_step(
        global_batch_size=num_rows, micro_batch_size=num_rows, dp_rank=0, dp_size=1
    )
    return batch


@fixture_is_only_a_writer
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda x: max(x) > 1),
    row_tokens=st.integers(4, 16),
)
def test_an_epoch_serves_every_label_of_every_document_once(
    write_source, facts: TokenizerFacts, lengths: list[int], row_tokens: int
) -> None:
    path = write_source("s", lengths)
    batch = epoch(Loader(windows(path, row_tokens), facts, 5))
    pair = TokenFile(path)
    documents = [pair.document(i).tolist() for i in range(pair.num_documents)]
    expected = Counter(p for d in documents for p in pairwise(d))
    covered = batch.loss_mask.astype(bool)
    served = zip(batch.tokens[covered].tolist(), batch.labels[covered].tolist(), strict=True)
    assert Counter(served) == expected
    assert (batch.tokens[~covered] == PAD).all() and EOD not in batch.tokens


def test_pieces_of_a_row_are_documents_of_their_own(write_source, facts: TokenizerFacts) -> None:
    path = write_source("s", [7, 5], first_id=10)
    batch = epoch(Loader(windows(path, 12), facts, 5))
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 17, 18, 19, 20, PAD, PAD]]
    assert batch.labels.tolist() == [[11, 12, 13, 14, 15, EOD, 18, 19, 20, EOD, PAD, PAD]]
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 12]
    assert batch.positions.tolist() == [[*range(6), *range(4), 0, 1]]


def test_documents_outside_the_bounds_are_left_out(write_source, facts: TokenizerFacts) -> None:
    path = write_source("s", [3, 9, 6, 20], first_id=10)
    batch = epoch(Loader(windows(path, 8, min_tokens=6, max_tokens=9), facts, 5))
    assert set(batch.tokens.reshape(-1).tolist()) == {PAD, *range(13, 21), *range(22, 27)}
    with pytest.raises(DataError, match=r"'long': no document .* has 21 to any number of tokens"):
        Loader(windows(path, 8, min_tokens=21), facts, 5)


def test_masked_tokens_are_read_and_left_out(tmp_path: Path, facts: TokenizerFacts) -> None:
    with TokenFileWriter(tmp_path / "s", facts) as writer:
        writer.add(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1]))
        writer.add(np.array([9, 10, 11]), np.array([0, 1, 0]))
    path = str(tmp_path / "s")
    for unit in (6, 2):
        batch = epoch(Loader(windows(path, 6, unit), facts, 5))
        assert batch.tokens.tolist() == [[5, 6, 7, 9, 10, PAD]]
        assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 0, 0]]

    def stream(**source: str) -> Loader:
        sources = (SourceConfig(name="long", path=path, **source),)
        return Loader(DataConfig(sequence_length=6, unit_tokens=6, sources=sources), facts, 5)

    plain = epoch(stream(overlong="cut"))
    assert plain.labels.tolist() == [[6, 7, 8, 9, 10, 11]]
    assert plain.loss_mask.tolist() == [[0, 1, 1, 0, 1, 0]]
    with pytest.raises(DataError, match=r"'long': .* holds conversations, which a stream cuts"):
        stream()


def test_pair_without_the_mask_of_its_manifest_is_refused(
    chats: str, write_source, facts: TokenizerFacts
) -> None:
    text = write_source("text", [14, 18])
    Path(f"{chats}.mask").rename(f"{text}.mask")
    for path, message in ((chats, "chats.mask is missing"), (text, "text.mask is not its own")):
        with pytest.raises(DataError, match=message):
            Loader(windows(path, 20), facts, 5)


def test_mask_of_another_length_is_refused(tmp_path: Path, facts: TokenizerFacts) -> None:
    with TokenFileWriter(tmp_path / "s", facts) as writer:
        writer.add(np.array([5, 6]), np.array([0, 1]))
    (tmp_path / "s.mask").write_bytes(b"\1")
    with pytest.raises(DataError, match=r"s\.mask has 1 tokens, .* has 2"):
        TokenFile(tmp_path / "s")


def test_table_of_rows_is_kept_and_read_back(write_source, facts: TokenizerFacts) -> None:
    path = write_source("s", [9, 14, 3, 30], first_id=10)
    first = epoch(Loader(windows(path, 8), facts, 5))
    (kept,) = Path(path).parent.glob("*.windows.npy")
    written = kept.stat().st_mtime_ns
    second = epoch(Loader(windows(path, 8), facts, 5))
    assert np.array_equal(first.tokens, second.tokens)
    assert kept.stat().st_mtime_ns == written
    write_source("s", [9, 14, 3, 31], first_id=10)
    assert 61 + 3 in epoch(Loader(windows(path, 8), facts, 5)).tokens


def test_long_rows_blend_with_recall_of_the_pretraining_stream(
    write_source, facts: TokenizerFacts
) -> None:
    """4 units a row: 30% long windows, 70% recall that goes on where pretraining stopped."""
    web = SourceConfig(name="web", path=write_source("web", [4001], first_id=10))
    recall = DataConfig(sequence_length=4, unit_tokens=4, sources=(web,))
    pretraining = Loader(recall, facts, 5)
    size = {"micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    before = pretraining.next_step(global_batch_size=200, **size)
    path = write_source("long", [33, 17, 40, 16], first_id=1_000_000)
    mixed = DataConfig(
        sequence_length=16,
        unit_tokens=4,
        sources=(
            web.model_copy(update={"weight": 0.7}),
            SourceConfig(name="long", path=path, kind="windows", weight=0.3),
        ),
    )
    loader = Loader(mixed, facts, 5, pretraining.state())
    after = loader.next_step(global_batch_size=100, **size)
    is_long = np.array([batch.tokens.max() >= 1_000_000 for batch in after])
    drawn = np.cumsum(is_long)
    assert np.abs(drawn - 0.3 * np.arange(1, 101)).max() < 1
    rest = pretraining.next_step(global_batch_size=280, **size)
    recalled = np.concatenate(
        [b.tokens.reshape(-1) for b, long in zip(after, is_long, strict=True) if not long]
    )
    assert np.array_equal(recalled, np.concatenate([b.tokens.reshape(-1) for b in rest]))
    assert len(before) == 200


def test_blend_by_loss_tokens_stays_within_two_samples(
    write_source, tmp_path: Path, facts: TokenizerFacts
) -> None:
    rng = np.random.default_rng(3)
    with TokenFileWriter(tmp_path / "chat", facts) as writer:
        for _ in range(80):
            length = int(rng.integers(3, 30))
            ids = np.full(length, 1_000_000)
            writer.add(ids, rng.integers(0, 2, length))
    sources = (
        SourceConfig(name="chat", path=f"{tmp_path}/chat", kind="windows", weight=0.25),
        SourceConfig(name="web", path=write_source("web", [5] * 300), weight=0.75),
    )
    config = DataConfig(sequence_length=32, unit_tokens=8, sources=sources, weigh_by="loss_tokens")
    loader = Loader(config, facts, 5)
    (batch,) = loader.next_step(global_batch_size=120, micro_batch_size=120, dp_rank=0, dp_size=1)
    loss = batch.loss_mask.sum(axis=1)
    chat = np.where(batch.tokens.max(axis=1) >= 1_000_000, loss, 0)
    error = np.cumsum(chat) - 0.25 * np.cumsum(loss)
    assert np.abs(error).max() < 2 * loss.max()
    counted = {name: s["loss_tokens"] for name, s in loader.state()["sources"].items()}
    assert counted == {"chat": chat.sum(), "web": (loss - chat).sum()}


@pytest.fixture
def chats(tmp_path: Path, facts: TokenizerFacts) -> str:
    """Conversations of 5, 13 and 14 tokens, of which the loss covers the last 2, 3 and 12."""
    with TokenFileWriter(tmp_path / "chats", facts) as writer:
        for first_id, length, covered in ((10, 5, 2), (20, 13, 3), (40, 14, 12)):
            mask = np.zeros(length)
            mask[-covered:] = 1
            writer.add(np.arange(first_id, first_id + length), mask)
    return str(tmp_path / "chats")


def test_conversations_that_do_not_fit_are_refused_until_the_recipe_decides(
    chats: str, write_source, facts: TokenizerFacts
) -> None:
    message = r"'long': 2 of 3 conversations in .*chats do not fit into data\.sequence_length=8; .*"
    for _ in range(2):  # The table is computed, then read.
        with pytest.raises(DataError, match=message + r'overlong="truncate"'):
            Loader(windows(chats, 8), facts, 5)
        Loader(windows(chats, 8, overlong="cut"), facts, 5)
    Loader(windows(chats, 13), facts, 5)
    Loader(windows(write_source("text", [30]), 8), facts, 5)


@pytest.mark.parametrize(
    ("overlong", "covered", "note"),
    [
        # The second conversation's first 8 labels hold no answer.
        ("truncate", {13, 14, *range(42, 49)}, "2 longer than a row .*, 17 tokens dropped"),
        ("drop", {13, 14}, "2 longer than a row .*, 25 tokens dropped"),
        (
            "cut",
            {13, 14, *range(30, 33), *range(42, 54)},
            "2 longer than a row .*, 8 tokens dropped",
        ),
    ],
)
def test_what_becomes_of_long_conversations_is_chosen_and_counted(
    chats: str, facts: TokenizerFacts, overlong: str, covered: set[int], note: str
) -> None:
    data = windows(chats, 8, overlong=overlong).model_copy(update={"weigh_by": "loss_tokens"})
    loader = Loader(data, facts, 5)
    batch = epoch(loader)
    assert loader.state()["sources"]["long"]["loss_tokens"] == len(covered) == batch.loss_mask.sum()
    assert set(batch.labels[batch.loss_mask > 0].tolist()) == covered
    assert re.search(rf"'long': 3 documents in \d rows of 8 tokens.*{note}", loader.notes[0])
    # A part without an answer is not even read.
    assert 20 not in batch.tokens and (28 in batch.tokens) == (overlong == "cut")


def test_rows_of_another_length_or_bounds_are_another_source(
    write_source, facts: TokenizerFacts
) -> None:
    path = write_source("s", [9, 14, 3, 30])
    state = Loader(windows(path, 8), facts, 5).state()
    for other in (windows(path, 16, 8), windows(path, 8, min_tokens=9)):
        with pytest.raises(DataError, match=r"'long' is \d rows of .*also sequence_length and the"):
            Loader(other, facts, 5, state)


def test_tables_and_manifests_are_kept_where_the_recipe_says(
    write_source, tmp_path: Path, facts: TokenizerFacts
) -> None:
    for number in range(3):
        write_source(f"s{number}", [9, 14, 3], 100 * number + 10)
    before = set(tmp_path.iterdir())
    cache = tmp_path / "cache" / "here"
    data = windows(f"{tmp_path}/s*", 8).model_copy(update={"cache_dir": str(cache)})
    first = epoch(Loader(data, facts, 5))
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]
    assert set(tmp_path.iterdir()) == before | {cache.parent}
    with patch(
        "phi4.data.stream.window_table._computed", side_effect=AssertionError("packed again")
    ):
        assert np.array_equal(epoch(Loader(data, facts, 5)).tokens, first.tokens)
    with pytest.raises(DataError, match=r"data\.cache_dir=.* cannot be created"):
        Loader(data.model_copy(update={"cache_dir": f"{tmp_path}/s0.bin/x"}), facts, 5)


def test_rank_that_cannot_keep_its_table_says_so(write_source, facts: TokenizerFacts) -> None:
    path = write_source("s", [9, 14, 3])
    with patch("phi4.data.stream.kept_table.os.access", return_value=False):
        (note,) = Loader(windows(path, 8), facts, 5).notes
    assert note.endswith("the shards' directory is not writable: set data.cache_dir")
    assert not list(Path(path).parent.glob("*.npy"))
