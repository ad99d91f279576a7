"""Safetensors shards against the safetensors package, and the ways in which they are damaged."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from phi4.convert import hf_shards
from phi4.convert.hf_shards import INDEX_NAME, ShardWriter, locate, read_tensors
from phi4.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5.0) + 10,
    "c": torch.arange(4.0).view(4, 1) - 7,
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def stored(tmp_path):
    """Two shards: a and b in 44 bytes, c in 16."""
    directory = tmp_path / "stored"
    directory.mkdir()
    writer = ShardWriter(directory, SHAPES, dtype="fp32", max_shard_bytes=44)
    for name in ("c", "a", "b"):
        writer.write(name, TENSORS[name])
    writer.finish()
    return directory


def _one_file(directory, tensors):
    for path in directory.iterdir():
        path.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_shards_are_what_the_package_reads(stored):
    first = load_file(stored / "model-00001-of-00002.safetensors")
    second = load_file(stored / "model-00002-of-00002.safetensors")

    assert first.keys() == {"a", "b"} and second.keys() == {"c"}
    assert all(torch.equal(t, TENSORS[n]) for n, t in (first | second).items())


def test_index_counts_parameters_and_bytes(stored):
    index = json.loads((stored / INDEX_NAME).read_text())

    assert index["metadata"] == {"total_parameters": 15, "total_size": 60}
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_shard_bytes=st.integers(1, 120),
    dtype=st.sampled_from(["fp32", "bf16"]),
)
def test_any_split_reads_back_and_keeps_the_limit(tmp_path_factory, sizes, max_shard_bytes, dtype):
    directory = tmp_path_factory.mktemp("split")
    tensors = {f"t{i}": torch.arange(size) + 100.0 * i for i, size in enumerate(sizes)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writer = ShardWriter(directory, shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
    for name, tensor in reversed(tensors.items()):
        writer.write(name, tensor)
    writer.finish()
    found = dict(read_tensors(locate(directory, shapes)))

    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype))
    for file in directory.glob("*.safetensors"):
        shard = load_file(file)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_shard_bytes


def test_a_transposed_tensor_is_stored_in_row_order(tmp_path):
    writer = ShardWriter(tmp_path, {"a": (3, 2)}, dtype="fp32", max_shard_bytes=1)
    writer.write("a", TENSORS["a"].T)

    assert torch.equal(
        load_file(tmp_path / "model-00001-of-00001.safetensors")["a"], TENSORS["a"].T
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_not_read(stored, monkeypatch, value):
    monkeypatch.setattr(hf_shards, "_COUNTED_VALUES", 2)
    _one_file(stored, TENSORS | {"b": torch.tensor([1, value, 2, 3, value])})
    tensors = read_tensors(locate(stored, SHAPES))

    assert next(tensors)[0] == "a"
    with pytest.raises(CheckpointError, match="b has non-finite values: 2 of 5; copy"):
        next(tensors)


@pytest.mark.parametrize(
    ("value", "dtype"), [(torch.nan, "fp32"), (torch.inf, "bf16"), (3.4e38, "bf16")]
)
def test_non_finite_values_are_not_written(tmp_path, value, dtype):
    writer = ShardWriter(tmp_path, SHAPES, dtype=dtype, max_shard_bytes=44)
    message = f"tensor b has non-finite values in {dtype}: 1 of 5; export"

    with pytest.raises(CheckpointError, match=message):
        writer.write("b", torch.tensor([1, value, 2, 3, 4]))


def test_a_truncated_shard_is_refused(stored):
    shard = stored / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])

    with pytest.raises(
        CheckpointError, match=r"00002-of-00002\.safetensors is damaged or incomplete"
    ):
        locate(stored, SHAPES)


def test_a_missing_shard_is_refused(stored):
    (stored / "model-00001-of-00002.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors is missing, but the"):
        locate(stored, SHAPES)


def test_a_shard_that_goes_away_after_the_check_is_refused(stored):
    place = locate(stored, SHAPES)
    shutil.rmtree(stored)

    with pytest.raises(CheckpointError, match="is missing, but the index names it"):
        list(read_tensors(place))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "1 tensors are missing, the first is b; expected the 3 tensors"),
        ({"b.bias": torch.ones(1)}, "1 tensors are not part of Phi-4, the first is b.bias"),
        ({"b": torch.ones(6)}, r"b has shape \[6\], config.json says \[5\]"),
        ({"b": torch.ones(5, dtype=torch.int8)}, "b is stored as I8, expected one of F32, BF16"),
    ],
)
def test_foreign_tensors_are_refused(stored, change, message):
    tensors = {n: t for n, t in (TENSORS | change).items() if t is not None}
    _one_file(stored, tensors)

    with pytest.raises(CheckpointError, match=message):
        locate(stored, SHAPES)


def test_a_tensor_in_two_shards_is_refused(stored):
    save_file(TENSORS, stored / "model-00002-of-00002.safetensors")

    with pytest.raises(
        CheckpointError, match=r"a is in both model-00001-of-00002\.safetensors and "
    ):
        locate(stored, SHAPES)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a safetensors index"),
        ('{"weight_map": ["a"]}', "is not a safetensors index"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "names files outside its directory"),
        ('{"weight_map": {"a": 1}}', "names files outside its directory"),
    ],
)
def test_a_damaged_index_is_refused(stored, index, message):
    (stored / INDEX_NAME).write_text(index)

    with pytest.raises(CheckpointError, match=message):
        locate(stored, SHAPES)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(CheckpointError, match="only safetensors are read"):
        locate(tmp_path, SHAPES)
