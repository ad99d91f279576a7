import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.adopt import adopt
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.stream import windows
from phi4.data.stream.batch import Batch
from phi4.data.stream.kinds import KINDS, open_source
from phi4.data.stream.loader import HeldOut, Loader, open_held_out
from phi4.data.stream.sources import read_source
from phi4.data.stream.stream import Source
from phi4.data.stream.units import Rows, ShardPool, UnitSource
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError, LayoutError
from tests.data.preferences import write_conversations, write_pairs, write_pivots

EOD, PAD = 0, 1
SECOND_SOURCE = 1_000_000
fixture_is_only_a_writer = settings(max_examples=40)


def data_config(paths: dict[str, tuple[str, float]], *, unit: int = 4, row_units: int = 2, **other):
    sources = tuple(SourceConfig(name=n, path=p, weight=w) for n, (p, w) in paths.items())
    return DataConfig(sequence_length=unit * row_units, unit_tokens=unit, sources=sources, **other)


ALONE = {"global_batch_size": 4, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}


def rows(batches: Sequence[Batch], field: str) -> np.ndarray:
    return np.concatenate([getattr(batch, field) for batch in batches])


def step(loader: Loader, num_rows: int) -> list[Batch]:
    """The next global batch on one rank, in micro-batches of one row."""
    return loader.next_step(global_batch_size=num_rows, micro_batch_size=1, dp_rank=0, dp_size=1)


@pytest.fixture
def two_sources(write_source) -> dict[str, tuple[str, float]]:
    return {
        "a": (write_source("a", [9, 1, 30, 17, 4]), 0.3),
        "b": (write_source("b", [50, 3, 12], SECOND_SOURCE), 0.7),
    }


@fixture_is_only_a_writer
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda x: sum(x) > 9),
    unit=st.integers(1, 9),
    row_units=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
def test_every_token_but_the_first_is_a_label_once_per_epoch(
    write_source, facts: TokenizerFacts, lengths: list[int], unit: int, row_units: int, epochs: int
) -> None:
    path = write_source("s", lengths)
    tokens = TokenFile(path).tokens
    num_units = -(-(tokens.size - 1) // unit)
    config = data_config({"s": (path, 1.0)}, unit=unit, row_units=row_units)
    loader = Loader(config, facts, seed=3)
    # A row holds row_units units, so this many rows are whole epochs.
    batches = step(loader, num_units * epochs)
    labels, inputs, mask = (rows(batches, f) for f in ("labels", "tokens", "loss_mask"))
    served = (labels != PAD).reshape(-1)
    pairs = Counter(zip(inputs.reshape(-1)[served], labels.reshape(-1)[served], strict=True))
    expected = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    assert pairs == {pair: n * epochs * row_units for pair, n in expected.items()}
    assert np.array_equal(mask, (labels != PAD) & (inputs != EOD))
    one_epoch = rows(batches, "labels").reshape(-1)[: num_units * unit]
    assert Counter(one_epoch[one_epoch != PAD].tolist()) == Counter(tokens[1:].tolist())


@settings(fixture_is_only_a_writer, max_examples=12)
@given(
    layouts=st.lists(
        st.tuples(
            st.sampled_from([16, 32]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2])
        ),
        min_size=1,
        max_size=5,
    ),
    document_mask=st.booleans(),
)
def test_stream_does_not_depend_on_layout_batch_or_resume(
    two_sources, facts: TokenizerFacts, layouts: list[tuple[int, int, int]], document_mask: bool
) -> None:
    config = data_config(two_sources, document_mask=document_mask)
    total = sum(num_rows for num_rows, _, _ in layouts)
    straight = step(Loader(config, facts, 7), total)
    state, cut = None, []
    for num_rows, dp_size, micro in layouts:
        ranks = [Loader(config, facts, 7, state) for _ in range(dp_size)]
        for rank, loader in enumerate(ranks):
            cut += loader.next_step(
                global_batch_size=num_rows, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size
            )
        state = json.loads(json.dumps(ranks[-1].state()))
    for field in ("tokens", "labels", "loss_mask", "positions"):
        assert np.array_equal(rows(cut, field), rows(straight, field))


def test_ledger_is_the_same_on_every_rank(two_sources, facts: TokenizerFacts) -> None:
    states = []
    for rank in range(4):
        loader = Loader(data_config(two_sources), facts, 7)
        loader.next_step(global_batch_size=8, micro_batch_size=2, dp_rank=rank, dp_size=4)
        states.append(loader.state())
    assert all(state == states[0] for state in states)
    assert sum(source["drawn"] for source in states[0]["sources"].values()) == 16


def test_row_length_may_change_and_the_stream_goes_on(two_sources, facts: TokenizerFacts) -> None:
    short = data_config(two_sources, row_units=1)
    straight = rows(step(Loader(short, facts, 7), 24), "tokens").reshape(-1)
    loader = Loader(short, facts, 7)
    first = rows(step(loader, 8), "tokens").reshape(-1)
    longer = Loader(data_config(two_sources, row_units=4), facts, 7, loader.state())
    rest = rows(step(longer, 4), "tokens").reshape(-1)
    assert np.array_equal(np.concatenate([first, rest]), straight)


def test_blend_counted_in_served_tokens_stays_within_a_unit(
    two_sources, facts: TokenizerFacts
) -> None:
    config = data_config(two_sources, row_units=1)
    served = rows(step(Loader(config, facts, 7), 400), "tokens")
    drawn = np.cumsum(served.max(axis=1) >= SECOND_SOURCE)
    assert np.abs(drawn - 0.7 * np.arange(1, 401)).max() < 1


def test_changed_blend_repeats_and_loses_nothing(write_source, facts: TokenizerFacts) -> None:
    a = write_source("a", [41])
    b = write_source("b", [41], SECOND_SOURCE)
    first = Loader(data_config({"a": (a, 0.5), "b": (b, 0.5)}, row_units=1), facts, 7)
    served = rows(step(first, 6), "labels")
    retired = Loader(data_config({"b": (b, 1.0)}, row_units=1), facts, 7, first.state())
    served = np.concatenate([served, rows(step(retired, 4), "labels")])
    back = {"a": (a, 0.7), "b": (b, 0.3)}
    last = Loader(data_config(back, row_units=1), facts, 7, retired.state())
    served = np.concatenate([served, rows(step(last, 10), "labels")])
    # 10 units each, 20 served under three blends: an epoch of both.
    every = np.concatenate([TokenFile(path).tokens[1:] for path in (a, b)])
    assert Counter(served.reshape(-1).tolist()) == Counter(every.tolist())


def test_epochs_differ_and_seeds_differ(write_source, facts: TokenizerFacts) -> None:
    config = data_config({"s": (write_source("s", [401]), 1.0)}, row_units=1)
    loader = Loader(config, facts, 7)
    one, two = (rows(step(loader, 100), "tokens")[:, 0] for _ in range(2))
    other = rows(step(Loader(config, facts, 8), 100), "tokens")[:, 0]
    assert sorted(one) == sorted(two) == sorted(other)
    assert not np.array_equal(one, two) and not np.array_equal(one, other)


def test_order_of_sources_in_the_recipe_means_nothing(two_sources, facts: TokenizerFacts) -> None:
    turned = dict(reversed(two_sources.items()))
    one, other = (step(Loader(data_config(s), facts, 7), 20) for s in (two_sources, turned))
    assert np.array_equal(rows(one, "tokens"), rows(other, "tokens"))


def test_shards_are_cut_each_on_its_own(write_source, facts: TokenizerFacts) -> None:
    path = write_source("s0", [9], 10)
    write_source("s1", [9], 110)
    manifest = read_source(path[:-1] + "*", facts)
    source = UnitSource("s", manifest, ShardPool(1), facts, 4)
    rows_ = Rows.empty(source.num_units, 4)
    for unit in range(source.num_units):
        source.fill(unit, rows_.cut(unit, 0, 4))
    assert rows_.tokens.tolist() == [[t, t + 1, t + 2, t + 3] for t in (10, 14, 110, 114)]
    last = [[t + 1, t + 2, t + 3, t + 4] for t in (10, 110)]
    final = [[t + 1, t + 2, t + 3, EOD] for t in (14, 114)]
    assert rows_.labels.tolist() == [last[0], final[0], last[1], final[1]]
    assert rows_.weights.all()
    assert source.locate(3, 2).endswith("s1.bin, document 0, offset 6")


def test_documents_share_a_row_when_the_mask_is_off(two_sources, facts: TokenizerFacts) -> None:
    masked, plain = (
        step(Loader(data_config(two_sources, document_mask=on), facts, 7), 8)
        for on in (True, False)
    )
    assert all(batch.cu_seqlens.tolist() == [0, 8] for batch in plain)
    assert all(batch.cu_seqlens.size > 2 for batch in masked)


def test_two_held_out_sources_of_one_name_are_refused(write_source, facts: TokenizerFacts) -> None:
    twice = tuple(SourceConfig(name="s", path=write_source(f"s{i}", [9])) for i in range(2))
    with pytest.raises(DataError, match="two sources are named 's'"):
        HeldOut(DataConfig(held_out=twice), facts, 7)


def test_partial_unit_of_an_unfinished_document_is_padded(
    tmp_path: Path, facts: TokenizerFacts
) -> None:
    with TokenFileWriter(tmp_path / "s", facts) as writer:
        writer.add(np.arange(5, 12))
    batches = step(Loader(data_config({"s": (f"{tmp_path}/s", 1.0)}, row_units=1), facts, 1), 2)
    (batch,) = [batch for batch in batches if 9 in batch.tokens[:, 0]]
    assert batch.tokens.tolist() == [[9, 10, 11, PAD]]
    assert batch.labels.tolist() == [[10, 11, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0]]


def test_token_beyond_the_vocabulary_is_located(tmp_path: Path) -> None:
    facts = TokenizerFacts(vocab_size=100, eod_id=EOD, pad_id=PAD, fingerprint="x")
    with TokenFileWriter(tmp_path / "s", facts) as writer:
        for document in ([5] * 10, [5, 5, 5, 100, 5, EOD]):
            writer.add(np.array(document))
    loader = Loader(data_config({"s": (str(tmp_path / "s"), 1.0)}, row_units=1), facts, 1)
    message = (
        rf"source 's', {tmp_path}/s\.bin, document 1, offset 3: token id 100 is outside the "
        "vocabulary of 100"
    )
    with pytest.raises(DataError, match=message):
        step(loader, 4)


def test_negative_token_is_refused(tmp_path: Path, facts: TokenizerFacts) -> None:
    with TokenFileWriter(tmp_path / "s", facts) as writer:
        writer.add(np.array([5, -1, 5, 5, 5]))
    loader = Loader(data_config({"s": (str(tmp_path / "s"), 1.0)}, row_units=1), facts, 1)
    with pytest.raises(DataError, match="offset 1: token id -1"):
        step(loader, 1)


def test_uint16_files_are_served(tmp_path: Path, facts: TokenizerFacts) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/s.bin", dtype=np.uint16)
    builder.add_document([65_000, 2, 3, 4, EOD], [5])
    builder.finalize(f"{tmp_path}/s.idx")
    adopt(f"{tmp_path}/s", facts)
    config = data_config({"s": (f"{tmp_path}/s", 1.0)}, row_units=1)
    (batch,) = step(Loader(config, facts, 1), 1)
    assert batch.tokens.tolist() == [[65_000, 2, 3, 4]]
    assert batch.labels.tolist() == [[2, 3, 4, EOD]]


@pytest.mark.parametrize("other", ["fingerprint", "missing", "tiny", "weightless"])
def test_unusable_source_is_one_clear_line(
    write_source, facts: TokenizerFacts, tmp_path: Path, other: str
) -> None:
    path, weight, used, message = write_source("s", [5]), 1.0, facts, ""
    if other == "fingerprint":
        used, message = TokenizerFacts(9, EOD, PAD, "e" * 64), "by tokenizer f{12}, .* e{12}"
    elif other == "missing":
        path, message = str(tmp_path / "none"), r"none\.idx cannot be read"
    elif other == "tiny":
        path, message = (
            write_source("s", [4]),
            "'s': the longest shard .* has 3 labels, but a unit has 4",
        )
    else:
        weight, message = 0.0, "no data source with a weight above 0"
    with pytest.raises(DataError, match=message) as caught:
        Loader(data_config({"s": (path, weight)}), used, 1)
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_split_are_refused_before_the_ledger_moves(
    two_sources, facts: TokenizerFacts
) -> None:
    loader = Loader(data_config(two_sources), facts, 7)
    before = loader.state()
    with pytest.raises(
        LayoutError, match=r"global_batch_size=6 is not a multiple of .*=2 x data=2"
    ):
        loader.next_step(global_batch_size=6, micro_batch_size=2, dp_rank=0, dp_size=2)
    assert loader.state() == before


def test_source_hashes_are_those_of_the_manifests(two_sources, facts: TokenizerFacts) -> None:
    loader = Loader(data_config(two_sources), facts, 7)
    before = loader.source_hashes()
    assert set(before) == {"a", "b"} and before["a"] != before["b"]
    manifest = Path(f"{two_sources['a'][0]}.manifest.json")
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    after = Loader(data_config(two_sources), facts, 7).source_hashes()
    assert after["a"] != before["a"] and after["b"] == before["b"]


def test_held_out_batches_repeat_and_do_not_depend_on_the_layout(
    two_sources, facts: TokenizerFacts
) -> None:
    held_out = tuple(SourceConfig(name=n, path=p) for n, (p, _) in two_sources.items())
    config = data_config({}, held_out=held_out)
    evaluation = HeldOut(config, facts, 7)
    first, second = (list(evaluation.batches(3, **ALONE)) for _ in range(2))
    assert len(first) == 3
    joined = [rows(batches, "tokens") for batches in first]
    assert np.array_equal(joined, [rows(batches, "tokens") for batches in second])
    assert not np.array_equal(joined[0], joined[1])
    halves = [
        list(
            evaluation.batches(3, **ALONE | {"micro_batch_size": 1, "dp_rank": rank, "dp_size": 2})
        )
        for rank in range(2)
    ]
    for step_index in range(3):
        both = halves[0][step_index] + halves[1][step_index]
        assert np.array_equal(rows(both, "tokens"), joined[step_index])


def test_sources_are_read_once_however_often_a_stream_begins(
    two_sources, facts: TokenizerFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tuple(
        SourceConfig(name=n, path=p, kind="windows") for n, (p, _) in two_sources.items()
    )
    config = data_config(two_sources, held_out=held_out)
    read, table = Mock(wraps=read_source), Mock(wraps=windows.WindowTable)
    monkeypatch.setattr("phi4.data.stream.loader.read_source", read)
    monkeypatch.setattr(windows, "WindowTable", table)
    loader, evaluated = Loader(config, facts, 7), open_held_out(config, facts, 7)
    assert list(evaluated) == ["a", "b"]
    first, state = rows(step(loader, 4), "tokens"), loader.state()
    then = rows(step(loader, 4), "tokens")
    loader.go_to(state)
    assert np.array_equal(rows(step(loader, 4), "tokens"), then)
    loader.go_to(None)
    assert np.array_equal(rows(step(loader, 4), "tokens"), first)
    for _ in range(2):
        for source in evaluated.values():
            assert list(source.batches(2, **ALONE))
    assert (read.call_count, table.call_count) == (4, 2)


def test_two_held_out_sources_of_one_name_are_refused_together(
    write_source, facts: TokenizerFacts
) -> None:
    twice = tuple(SourceConfig(name="s", path=write_source(f"s{i}", [9])) for i in range(2))
    with pytest.raises(DataError, match="two sources are named 's'"):
        open_held_out(DataConfig(held_out=twice), facts, 7)


def test_every_kind_of_the_recipe_is_a_source(
    write_source, facts: TokenizerFacts, tmp_path: Path
) -> None:
    assert set(KINDS) == set(get_args(SourceConfig.model_fields["kind"].annotation))
    paths = {
        "conversations": write_conversations(tmp_path / "chats", [[1, 1, 0]]),
        "pairs": write_pairs(tmp_path / "pairs", 1),
        "pivots": write_pivots(tmp_path / "pivots", 1),
    }
    plain = write_source("s", [9, 30])
    data, pool = data_config({}).model_copy(update={"sequence_length": 32}), ShardPool(9)
    for kind in KINDS:
        path = paths.get(kind, plain)
        config = SourceConfig(name="s", path=path, kind=kind)
        source = open_source(config, read_source(path, facts), pool, facts, data)
        # Attributes without a value are invisible to isinstance.
        assert Source.__annotations__.keys() <= vars(source).keys() | vars(type(source)).keys()
        methods = {name for name in vars(Source) if not name.startswith("_")}
        assert all(callable(getattr(source, name)) for name in methods)


def test_held_out_sources_are_required_for_evaluation(facts: TokenizerFacts) -> None:
    with pytest.raises(DataError, match=r"data\.held_out"):
        HeldOut(DataConfig(), facts, 7)


def test_files_that_a_blend_holds_twice_are_said(write_source, facts, tmp_path: Path) -> None:
    for name, lengths in (("web_0", [30]), ("web_1", [50]), ("code", [20, 40]), ("prose", [90])):
        write_source(name, lengths, SECOND_SOURCE * len(name))
    for suffix in (".bin", ".idx", ".manifest.json"):
        for copy, original in (("web_2", "web_1"), ("copied", "web_0")):
            shutil.copy(tmp_path / f"{original}{suffix}", tmp_path / f"{copy}{suffix}")

    def notes(**paths: str) -> list[str]:
        sources = {name: (str(tmp_path / path), 1.0) for name, path in paths.items()}
        return Loader(data_config(sources), facts, 5).notes

    assert notes(code="code", prose="prose", web="web_[01]") == []
    assert notes(code="code", again="code", prose="prose") == [
        "sources 'again' and 'code' share files, 100% of the first one's tokens and 100% of "
        "the second's; each source draws them in its own epochs"
    ]
    assert notes(web="web_[012]", copied="copied") == [
        "source 'web': 38% of its tokens are duplicates within the source; an epoch draws them "
        "more than once",
        "sources 'copied' and 'web' share files, 100% of the first one's tokens and 23% of the "
        "second's; each source draws them in its own epochs",
    ]
