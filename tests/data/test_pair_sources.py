"""Pairs and pivots in rows: nothing lost, nothing parted, the same in every split of the batch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from phi4.config import DataConfig, SourceConfig
from phi4.data.stream import pair_source
from phi4.data.stream.batch import Batch
from phi4.data.stream.kinds import open_source
from phi4.data.stream.loader import Loader
from phi4.data.stream.pair_source import PairSource
from phi4.data.stream.sources import read_source
from phi4.data.stream.units import ShardPool
from phi4.errors import DataError
from tests.data.conftest import FACTS, PAD
from tests.data.preferences import (
    LOWEST_ID,
    Pivots,
    Side,
    drawn_pairs,
    drawn_pivots,
    write_conversations,
    write_pairs,
    write_pivots,
)

ROW = 32
NUM_PAIRS, NUM_TRAJECTORIES = 23, 11


class FakeCache:
    """Log-probabilities that name their item."""

    def __init__(self, num_items: int) -> None:
        self.values = -np.arange(2.0 * num_items).reshape(-1, 2) - 1

    def log_probs_of(self, source: PairSource) -> np.ndarray:
        return self.values


def opened(path: str, kind: str, length: int = ROW, **keys) -> PairSource:
    config = SourceConfig(name=kind, path=path, kind=kind, **keys)
    data = DataConfig(sequence_length=length, unit_tokens=length)
    return open_source(config, read_source(path, FACTS), ShardPool(4), FACTS, data)


def loader(*sources: SourceConfig, reference_cache: str | None = None) -> Loader:
    data = DataConfig(
        sequence_length=ROW, unit_tokens=ROW, sources=sources, reference_cache=reference_cache
    )
    return Loader(data, FACTS, seed=3)


def mixed(tmp_path: Path) -> tuple[SourceConfig, SourceConfig]:
    pairs = write_pairs(tmp_path / "pairs", NUM_PAIRS)
    pivots = write_pivots(tmp_path / "pivots", NUM_TRAJECTORIES)
    return (
        SourceConfig(name="pairs", path=pairs, kind="pairs", weight=2),
        SourceConfig(name="pivots", path=pivots, kind="pivots", weight=1),
    )


def segments(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Per pair: chosen labels, rejected labels, and the tokens seen before the first of them."""
    ids, labels = batch.segment_ids.reshape(-1), batch.labels.reshape(-1)
    tokens, positions = batch.tokens.reshape(-1), batch.positions.reshape(-1)
    second = batch.alternative_labels
    second = np.full_like(ids, -1) if second is None else second.reshape(-1)
    found = []
    for pair in range(batch.num_segments // 2):
        chosen, rejected = np.flatnonzero(ids == 2 * pair), np.flatnonzero(ids == 2 * pair + 1)
        first = chosen[0]
        alternatives = second[chosen][second[chosen] >= 0]
        context = tokens[first - positions[first] : first + 1]
        sides = labels[chosen], np.concatenate([labels[rejected], alternatives])
        found.append(tuple(tuple(part.tolist()) for part in (*sides, context)))
    return found


def expected_of_pair(sides: tuple[Side, Side]) -> tuple:
    answers = [side.ids[1:][side.mask[1:] != 0] for side in sides]
    first = np.flatnonzero(sides[0].mask[1:])[0]
    return tuple(tuple(part.tolist()) for part in (*answers, sides[0].ids[: first + 1]))


def expected_of_pivots(document: Pivots) -> list[tuple]:
    triples = zip(document.positions, document.chosen, document.rejected, strict=True)
    return [((int(c),), (int(r),), tuple(document.ids[: p + 1].tolist())) for p, c, r in triples]


def epoch(found: Loader, num_rows: int, **split: int) -> list[Batch]:
    split = {"micro_batch_size": 1, "dp_rank": 0, "dp_size": 1} | split
    return found.next_step(global_batch_size=num_rows, **split)


@pytest.mark.parametrize("rows_per_batch", [1, 4])
def test_an_epoch_holds_every_pair_once_and_whole(tmp_path: Path, rows_per_batch: int) -> None:
    path = write_pairs(tmp_path / "pairs", NUM_PAIRS)
    num_rows = opened(path, "pairs").num_units
    found = loader(SourceConfig(name="pairs", path=path, kind="pairs"))
    rows = num_rows + -num_rows % rows_per_batch
    batches = epoch(found, rows, micro_batch_size=rows_per_batch)
    seen = Counter(pair for batch in batches for pair in segments(batch))
    assert seen.keys() == {expected_of_pair(pair) for pair in drawn_pairs(NUM_PAIRS)}
    if rows == num_rows:
        assert set(seen.values()) == {1}
    for batch in batches:
        covered = batch.segment_ids >= 0
        assert np.array_equal(covered, batch.loss_mask == 1)
        assert (batch.tokens[batch.positions == 0] >= PAD).all()


def test_an_epoch_holds_every_pivot_once(tmp_path: Path) -> None:
    path = write_pivots(tmp_path / "pivots", NUM_TRAJECTORIES)
    found = loader(SourceConfig(name="pivots", path=path, kind="pivots"))
    batches = epoch(found, opened(path, "pivots").num_units)
    seen = Counter(pair for batch in batches for pair in segments(batch))
    documents = drawn_pivots(NUM_TRAJECTORIES)
    assert seen == Counter(pair for document in documents for pair in expected_of_pivots(document))
    for batch in batches:
        assert np.array_equal(batch.alternative_labels >= 0, batch.loss_mask == 1)


def test_references_follow_their_pairs_in_every_split(tmp_path: Path, monkeypatch) -> None:
    sources = mixed(tmp_path)
    sizes = {source.kind: opened(source.path, source.kind).num_items for source in sources}
    cache = {kind: FakeCache(count) for kind, count in sizes.items()}

    class Caches:
        def log_probs_of(self, source: PairSource) -> np.ndarray:
            return cache[source.kind].values + (0 if source.kind == "pairs" else -1000)

    monkeypatch.setattr(pair_source, "open_references", lambda cache_dir: Caches())

    def of_split(dp_size: int, micro_batch_size: int) -> tuple[list, float]:
        """Pairs with their references, sorted, and the mean number of chosen tokens."""
        found, means = [], set()
        for rank in range(dp_size):
            batches = epoch(
                loader(*sources, reference_cache="cache"),
                12,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
            )
            for batch in batches:
                reference = batch.segment_extras["reference"].reshape(-1, 2).tolist()
                means |= set(batch.segment_extras["tokens_per_pair"].tolist())
                found += zip(segments(batch), map(tuple, reference), strict=True)
        (mean,) = means
        return sorted(found), mean

    whole, mean = of_split(1, 12)
    assert mean == pytest.approx(np.mean([len(chosen) for (chosen, *_), _ in whole]))
    for dp_size, micro_batch_size in ((1, 1), (2, 3), (4, 1)):
        assert of_split(dp_size, micro_batch_size) == (whole, mean)
    items = {expected_of_pair(pair): i for i, pair in enumerate(drawn_pairs(NUM_PAIRS))}
    values = cache["pairs"].values
    for pair, reference in whole:
        if pair in items:
            assert reference == tuple(values[items[pair]].tolist())
        else:
            assert reference[0] <= -1000


def test_an_answer_ends_after_max_response_tokens(tmp_path: Path) -> None:
    pairs = drawn_pairs(NUM_PAIRS)
    same = np.arange(LOWEST_ID, LOWEST_ID + 9)
    mask = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1], np.uint8)
    # Equal in the first three tokens that count.
    pairs.append((Side(same, mask), Side(np.append(same[:5], same[:4]), mask)))
    path = write_pairs(tmp_path / "pairs", pairs)
    source = opened(path, "pairs", max_response_tokens=3)
    assert source.num_items == NUM_PAIRS
    assert source.describe().endswith("1 dropped: equal within max_response_tokens")
    found = loader(SourceConfig(name="p", path=path, kind="pairs", max_response_tokens=3))
    seen = {p for batch in epoch(found, source.num_units) for p in segments(batch)}
    whole = [expected_of_pair(pair) for pair in pairs[:-1]]
    assert seen == {(chosen[:3], rejected[:3], context) for chosen, rejected, context in whole}


@pytest.mark.parametrize("kind", ["pairs", "pivots"])
def test_a_hash_says_which_item_changed(tmp_path: Path, kind: str) -> None:
    documents = drawn_pairs(6) if kind == "pairs" else drawn_pivots(6)
    write = write_pairs if kind == "pairs" else write_pivots
    before = opened(write(tmp_path / "before", documents), kind).item_hashes()
    assert len(set(before.tolist())) == before.size
    changed = list(documents)
    if kind == "pairs":
        (chosen, rejected), item = documents[3], 3
        ids = chosen.ids.copy()
        ids[-1] += 1
        changed[3] = (Side(ids, chosen.mask), rejected)
    else:
        item = sum(document.positions.size for document in documents[:3])
        changed[3] = documents[3]._replace(rejected=documents[3].rejected + 1)
    after = opened(write(tmp_path / "after", changed), kind).item_hashes()
    assert np.flatnonzero(before != after)[0] == item
    last = documents[:-1]
    shorter = opened(write(tmp_path / "shorter", last), kind).item_hashes()
    assert np.array_equal(shorter, before[: shorter.size])


def test_bad_files_and_keys_are_refused_with_a_remedy(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", NUM_PAIRS)
    pivots = write_pivots(tmp_path / "pivots", 2)
    chats = write_conversations(tmp_path / "chats", [[0, 1, 1]])
    for path, kind, expected in (
        (pairs, "pivots", "kind=pivots, but .* holds pairs; set kind to pairs"),
        (pairs, "windows", "kind=windows, but .* holds pairs; set kind to pairs"),
        (pivots, "pairs", "kind=pairs, but .* holds pivots; set kind to pivots"),
        (chats, "pairs", "holds documents; set kind to conversations or windows"),
    ):
        with pytest.raises(DataError, match=expected):
            opened(path, kind)
    with pytest.raises(DataError, match=r"longer than a row, the longest has \d+ labels"):
        opened(pairs, "pairs", length=8)
    mask = np.array([0, 0], np.uint8)
    sides = Side(np.array([10, 11]), mask), Side(np.array([10, 12]), mask)
    with pytest.raises(DataError, match=r"document 1: the loss mask covers no token"):
        opened(write_pairs(tmp_path / "empty", [drawn_pairs(1)[0], sides]), "pairs")


def test_a_hole_in_the_cache_is_named(tmp_path: Path, monkeypatch) -> None:
    path = write_pairs(tmp_path / "pairs", NUM_PAIRS)
    cache = FakeCache(NUM_PAIRS)
    cache.values[7, 1] = np.nan
    monkeypatch.setattr(pair_source, "open_references", lambda cache_dir: cache)
    source = SourceConfig(name="pairs", path=path, kind="pairs")
    num_rows = opened(path, "pairs").num_units
    with pytest.raises(DataError, match=r"no log-probabilities of .*pairs\.bin, document 7;"):
        epoch(loader(source, reference_cache="cache"), num_rows)


@pytest.mark.parametrize(
    ("masks", "keys", "expected"),
    [
        ([[0, 1, 1], [0, 0, 0, 0], [0, 0, 1]], {}, r"covers no token of 1 .* is document 1 of"),
        ([[0, 1, 1]], {"overlong": "cut"}, "would begin a row inside a conversation"),
    ],
)
def test_conversations_without_loss_or_beginning_are_refused(
    tmp_path: Path, masks, keys, expected
) -> None:
    path = write_conversations(tmp_path / "chats", masks)
    with pytest.raises(DataError, match=expected):
        opened(path, "conversations", **keys)


def test_text_is_no_source_of_conversations(write_source) -> None:
    with pytest.raises(DataError, match="has no loss mask"):
        opened(write_source("text", [9, 12]), "conversations")
