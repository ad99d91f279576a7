import json
from pathlib import Path

import numpy as np
import pytest

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.token_file import TokenFile
from phi4.data.stream.loader import Loader
from phi4.data.stream.sources import read_source
from phi4.data.stream.units import ShardPool
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


@pytest.fixture
def shards(write_source) -> list[str]:
    (names := [f"web-{i:02}" for i in range(4)]).sort()
    return [write_source(name, [9 + i], 100 * i + 2) for i, name in enumerate(names)]


def kept(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("*.source.json"))


def test_globs_are_sorted_and_lists_keep_their_order(
    shards: list[str], tmp_path: Path, facts: TokenizerFacts
) -> None:
    found = read_source(f"{tmp_path}/web-*", facts).shards
    assert [shard.prefix for shard in found] == shards
    assert [shard.num_tokens for shard in found] == [9, 10, 11, 12]
    turned = tmp_path / "some.list"
    turned.write_text("web-02\n\nweb-00\n")
    found = read_source(str(turned), facts).shards
    assert [shard.prefix for shard in found] == [shards[2], shards[0]]


def test_source_manifest_is_kept_and_renewed_when_a_shard_changes(
    shards: list[str], write_source, tmp_path: Path, facts: TokenizerFacts
) -> None:
    first = read_source(f"{tmp_path}/web-*", facts)
    (path,) = kept(tmp_path)
    # A start reads the kept manifest only: the shards' own ones may be unreadable.
    content = json.loads(path.read_bytes())
    content["shards"][0]["num_documents"] = 77
    path.write_text(json.dumps(content))
    assert read_source(f"{tmp_path}/web-*", facts).shards[0].num_documents == 77
    write_source("web-03", [5], 2)
    second = read_source(f"{tmp_path}/web-*", facts)
    assert [shard.num_tokens for shard in second.shards] == [9, 10, 11, 5]
    assert second.content_hash != first.content_hash
    write_source("web-04", [5], 2)
    assert len(read_source(f"{tmp_path}/web-*", facts).shards) == 5


def test_content_hash_does_not_depend_on_the_place(
    shards: list[str], tmp_path: Path, facts: TokenizerFacts
) -> None:
    first = read_source(f"{tmp_path}/web-*", facts).content_hash
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in list(tmp_path.glob("web-*")):
        path.rename(moved / path.name)
    assert read_source(f"{moved}/web-*", facts).content_hash == first


def test_shards_open_when_drawn_and_close_beyond_the_limit(
    shards: list[str], tmp_path: Path, facts: TokenizerFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        "phi4.data.stream.units.TokenFile",
        lambda prefix: opened.append(prefix) or TokenFile(prefix),
    )
    source = SourceConfig(name="s", path=f"{tmp_path}/web-*")
    config = DataConfig(sequence_length=4, unit_tokens=4, sources=(source,), max_open_shards=2)
    loader = Loader(config, facts, 7)
    assert not opened
    loader.next_step(global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1)
    assert len(opened) == 1
    pool, items = ShardPool(2), read_source(source.path, facts).shards
    opened.clear()
    for index in (0, 1, 0, 2, 0, 1):
        pool.open(items[index])
    assert opened == [shards[i] for i in (0, 1, 2, 1)]


def test_shard_that_changed_under_a_running_job_is_refused(
    shards: list[str], write_source, tmp_path: Path, facts: TokenizerFacts
) -> None:
    source = read_source(f"{tmp_path}/web-*", facts)
    write_source("web-01", [30], 2)
    with pytest.raises(DataError, match=r"web-01\.bin holds 30 tokens, but its manifest has 10"):
        ShardPool(1).open(source.shards[1])


def test_stream_over_shards_is_that_of_their_units(
    shards: list[str], tmp_path: Path, facts: TokenizerFacts
) -> None:
    source = SourceConfig(name="s", path=f"{tmp_path}/web-*")
    config = DataConfig(sequence_length=4, unit_tokens=4, sources=(source,))
    loader = Loader(config, facts, 7)
    num_units = 2 + 3 + 3 + 3
    batches = loader.next_step(
        global_batch_size=num_units, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    labels = np.concatenate([b.labels[b.loss_mask > 0] for b in batches])
    expected = np.concatenate([TokenFile(path).tokens[1:] for path in shards])
    assert sorted(labels.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none-*", r"none-\* matches no shard"),
        ("none.list", r"none\.list cannot be read as a list"),
        ("empty.list", r"empty\.list matches no shard"),
        ("twice.list", r"twice\.list lists .*web-00 twice"),
        ("lost.list", r"nothing\.idx cannot be read"),
        ("web-?[0-9]", r"web-01\.manifest\.json does not exist"),
    ],
)
def test_unusable_source_is_one_clear_line(
    shards: list[str], tmp_path: Path, facts: TokenizerFacts, path: str, message: str
) -> None:
    (tmp_path / "empty.list").write_text("\n")
    (tmp_path / "twice.list").write_text("web-00\nweb-00\n")
    (tmp_path / "lost.list").write_text("web-00\nnothing\n")
    Path(f"{shards[1]}.manifest.json").unlink()
    with pytest.raises(DataError, match=message) as caught:
        read_source(f"{tmp_path}/{path}", facts)
    assert "\n" not in str(caught.value)


def test_shards_of_two_tokenizers_do_not_mix(
    shards: list[str], tmp_path: Path, facts: TokenizerFacts
) -> None:
    manifest = Path(f"{shards[1]}.manifest.json")
    manifest.write_text(manifest.read_text().replace("f" * 64, "e" * 64))
    with pytest.raises(DataError, match="were written by different tokenizers"):
        read_source(f"{tmp_path}/web-*", facts)


def test_more_epochs_than_allowed_are_refused_before_the_ledger_moves(
    write_source, facts: TokenizerFacts
) -> None:
    source = SourceConfig(name="s", path=write_source("s", [41]), max_epochs=1.5)
    config = DataConfig(sequence_length=4, unit_tokens=4, sources=(source,))
    loader = Loader(config, facts, 7)
    size = {"micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    loader.require_epochs(15)
    with pytest.raises(
        DataError, match=r"'s' would be read 1\.60 times, but its max_epochs is 1\.5"
    ):
        loader.require_epochs(16)
    loader.next_step(global_batch_size=15, **size)
    before = loader.state()
    with pytest.raises(
        DataError, match=r"'s' would be read 1\.60 times, but its max_epochs is 1\.5"
    ):
        loader.next_step(global_batch_size=1, **size)
    assert loader.state() == before


def test_pair_with_a_pattern_for_a_name_is_that_pair(
    write_source, tmp_path: Path, facts: TokenizerFacts
) -> None:
    named = write_source("web[1]", [5])
    other = write_source("web1", [7])
    assert [shard.prefix for shard in read_source(named, facts).shards] == [named]
    assert not kept(tmp_path)
    assert read_source(f"{tmp_path}/web[0-9]", facts).shards[0].prefix == other
