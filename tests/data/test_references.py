"""A reference cache serves what it was computed for; what differs is named."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from phi4.data.files.manifest import encode_manifest
from phi4.data.stream import reference_files, references
from phi4.data.stream.reference_difference import ItemDifference, first_difference
from phi4.data.stream.reference_files import (
    FINISHED,
    UNFINISHED,
    ReferenceManifest,
    array_bytes,
    array_path,
    array_sha256,
    source_references,
)
from phi4.data.stream.references import ReferenceCache, open_references
from phi4.errors import CheckpointError, DataError

WEIGHTS = {"embedding": "a" * 64, "layer.0": "b" * 64}
LOG_PROBS = np.arange(8.0).reshape(4, 2)


@dataclass
class Items:
    """A source of items with these hashes."""

    hashes: list[int]
    manifest: str
    """Its chat template."""
    name: str = "web/pairs"

    @property
    def num_items(self) -> int:
        return len(self.hashes)

    def item_hashes(self) -> np.ndarray:
        return np.array(self.hashes, dtype=np.uint64)

    def locate_item(self, item: int) -> str:
        return f"document {item}"


@pytest.fixture(autouse=True)
def templates(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reference_files, references):
        monkeypatch.setattr(module, "chat_templates", lambda manifest: (manifest,))


def items(*hashes: int, template: str = "c" * 64) -> Items:
    return Items(list(hashes), template)


def write_cache(directory: Path, source: Items) -> ReferenceCache:
    entry = source_references(source, source.item_hashes())
    entry = msgspec.structs.replace(entry, log_probs_sha256=array_sha256(LOG_PROBS))
    manifest = ReferenceManifest(dtype="fp32", weights=WEIGHTS, sources={source.name: entry})
    array_path(directory, source.name, "items").write_bytes(array_bytes(source.item_hashes()))
    array_path(directory, source.name, "log_probs").write_bytes(array_bytes(LOG_PROBS))
    (directory / FINISHED).write_bytes(encode_manifest(manifest))
    return open_references(directory)


def refusal(check, *arguments) -> str:
    with pytest.raises((DataError, CheckpointError)) as refused:
        check(*arguments)
    (line,) = str(refused.value).splitlines()
    return line


def test_cache_gives_what_was_written(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, items(1, 2, 3, 4))
    cache.check_source(items(1, 2, 3, 4))
    cache.check_model("fp32", WEIGHTS)
    cache.check_names(["web/pairs"])
    np.testing.assert_array_equal(cache.log_probs("web/pairs"), LOG_PROBS)
    np.testing.assert_array_equal(cache.log_probs_of(items(1, 2, 3, 4)), LOG_PROBS)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ((1, 2, 9, 4), "item 2 (document 2) is not what the reference cache was computed for"),
        ((1, 3, 4), "item 1 of the reference cache is missing; its place now holds docume"),
        ((1, 2, 3), "item 3 of the reference cache is missing; the source ends before it"),
        ((1, 9, 2, 3, 4), "item 1 (document 1) is new: the reference cache does not have it"),
        ((1, 2, 3, 4, 5), "item 4 (document 4) is new"),
        ((2, 1, 3, 4), "item 0 (document 0) is at another position in the reference cache"),
    ],
)
def test_item_that_differs_is_named(tmp_path: Path, found: tuple[int, ...], line: str) -> None:
    cache = write_cache(tmp_path, items(1, 2, 3, 4))
    assert line in refusal(cache.check_source, items(*found))
    if len(found) != 4:
        assert line in refusal(cache.log_probs_of, items(*found))


@pytest.mark.parametrize(
    ("cached", "found", "expected"),
    [
        ([5, 5, 6], [5, 6], ("missing", 1)),
        ([5, 6], [5, 5, 6], ("new", 1)),
        ([1, 2], [1, 2], None),
        ([1, 2, 3], [3, 2, 1], ("moved", 0)),
        ([], [1], ("new", 0)),
    ],
)
def test_first_difference(cached: list[int], found: list[int], expected: tuple | None) -> None:
    difference = first_difference(np.array(cached, np.uint64), np.array(found, np.uint64))
    assert difference == (expected and ItemDifference(*expected))


def test_other_template_is_named(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, items(1, 2, 3, 4))
    line = refusal(cache.check_source, items(1, 2, 3, 4, template="d" * 64))
    assert "chat template dddddddddddd" in line and "cccccccccccc" in line


def test_other_model_is_named(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, items(1, 2, 3, 4))
    assert "precision.dtype=fp32, but the recipe has bf16" in refusal(cache.check_dtype, "bf16")
    changed = WEIGHTS | {"layer.0": "e" * 64}
    assert "tensor layer.0 (sha256 eeeeeeeeeeee, in the cache bbbbbbbbbbbb)" in refusal(
        cache.check_model, "fp32", changed
    )
    more = WEIGHTS | {"layer.1": "e" * 64}
    assert "only this model has tensor layer.1" in refusal(cache.check_model, "fp32", more)


def test_source_of_one_side_only_is_named(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, items(1, 2, 3, 4))
    assert "'new' is in the recipe but not in" in refusal(cache.check_names, ["new", "web/pairs"])
    assert "'web/pairs' is in the reference cache but not in" in refusal(cache.check_names, [])
    assert "has no source 'new'; it has 'web/pairs'" in refusal(cache.log_probs, "new")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, items(1, 2, 3, 4))
    path = array_path(tmp_path, "web/pairs", "log_probs")
    path.write_bytes(array_bytes(LOG_PROBS + 1))
    assert f"{path} has another sha256" in refusal(cache.check_source, items(1, 2, 3, 4))
    path.write_bytes(array_bytes(LOG_PROBS[:3]))
    assert "holds float64 (3, 2), expected float64 (4, 2)" in refusal(cache.log_probs, "web/pairs")
    path.write_bytes(array_bytes(LOG_PROBS)[:40])
    assert f"{path} cannot be read" in refusal(cache.log_probs, "web/pairs")
    (tmp_path / FINISHED).write_text("{}")
    assert "is not a manifest of a reference cache" in refusal(open_references, tmp_path)


def test_cache_that_is_not_there_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    assert "run `phi4 dpo cache-ref` with this recipe first" in refusal(open_references, tmp_path)
    (tmp_path / UNFINISHED).touch()
    assert "is unfinished; run `phi4 dpo cache-ref` again" in refusal(open_references, tmp_path)
