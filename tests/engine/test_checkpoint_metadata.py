"""The index of a checkpoint: parsed without running anything, refused when it is not ours."""

import enum
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from phi4.engine.checkpoint.metadata import parse_metadata
from phi4.errors import CheckpointError
from tests.support.hostile import calling

FILES = {"__0_0.distcp": 1000}
RECORD = "optimizer.state/shard_0_1"


def _index() -> Metadata:
    """One tensor in two chunks and one record of bytes."""
    halves = [ChunkStorageMetadata(torch.Size([i, 0]), torch.Size([2, 3])) for i in (0, 2)]
    properties = TensorProperties(dtype=torch.bfloat16)
    return Metadata(
        {
            "weight": TensorStorageMetadata(properties, torch.Size([4, 3]), halves),
            RECORD: BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("weight", [0, 0]): _StorageInfo("__0_0.distcp", 0, 400),
            MetadataIndex("weight", [2, 0]): _StorageInfo("__0_0.distcp", 400, 400),
            MetadataIndex(RECORD): _StorageInfo("__0_0.distcp", 800, 200),
        },
    )


def test_index_is_read_as_torch_wrote_it() -> None:
    index = _index()
    assert parse_metadata(pickle.dumps(index), FILES) == index


class _EarlyPython311(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: object) -> object:
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def test_index_of_an_early_python_3_11_is_read() -> None:
    index, stream = _index(), io.BytesIO()
    _EarlyPython311(stream, protocol=4).dump(index)
    assert b"getattr" in stream.getvalue()
    assert parse_metadata(stream.getvalue(), FILES) == index


def test_getattr_is_not_called() -> None:
    # Without what follows the call in `calling`: its result is what is loaded.
    program = calling("builtins", "getattr", "x").partition(b"R")[0] + b"R."
    with pytest.raises(CheckpointError, match="holds a getattr where a Metadata belongs"):
        parse_metadata(program, FILES)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.planner", "operator.reduce"),
        ("torch", "load"),
        ("collections", "OrderedDict"),
    ],
)
def test_only_exact_names_are_admitted(module: str, name: str) -> None:
    # Ends where the call is, so nothing but the name can be what is refused.
    program = calling(module, name, "x")[:-1] + b"."
    with pytest.raises(CheckpointError, match=rf"refers to {module}.{name}"):
        parse_metadata(program, FILES)


@pytest.mark.parametrize(
    ("opcode", "program"),
    [
        ("LONG_BINPUT", b"\x80\x04}r\xff\xff\xff\x7f."),
        ("GLOBAL", b"\x80\x02ctorch\nSize\n."),
        ("INST", b"(iposix\nsystem\n."),
        ("EXT1", b"\x80\x04\x82\x01."),
        ("PERSID", b"P1\n."),
        ("BYTEARRAY8", b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x."),
        ("NEXT_BUFFER", b"\x80\x05\x97."),
    ],
)
def test_opcodes_that_torch_does_not_write_are_refused(opcode: str, program: bytes) -> None:
    with pytest.raises(CheckpointError, match=f"opcode {opcode} at"):
        parse_metadata(program, FILES)


def test_records_run_nothing_of_the_class_that_they_name(monkeypatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("called")

    content = pickle.dumps(_index())
    monkeypatch.setattr(TensorProperties, "__setstate__", explode)
    assert set(parse_metadata(content, FILES).state_dict_metadata) == {"weight", RECORD}


def _declare_bytes(index: Metadata) -> None:
    index.state_dict_metadata["weight"] = BytesStorageMetadata()


def _declare_tensor(index: Metadata) -> None:
    index.state_dict_metadata[RECORD] = index.state_dict_metadata["weight"]


def _give_size(index: Metadata) -> None:
    index.state_dict_metadata[RECORD].size = torch.Size([4, 3])


def _place(*place: object) -> Callable[[Metadata], None]:
    def move(index: Metadata) -> None:
        index.storage_data[MetadataIndex("weight", [0, 0])] = _StorageInfo(*place)

    return move


def _undescribed(index: Metadata) -> None:
    index.storage_data[MetadataIndex("other")] = _StorageInfo("__0_0.distcp", 0, 1)


def _grow_chunk(index: Metadata) -> None:
    index.state_dict_metadata["weight"].chunks[1].sizes = torch.Size([3, 3])


def _text_for_size(index: Metadata) -> None:
    index.state_dict_metadata["weight"].size = "4, 3"


def _number_for_name(index: Metadata) -> None:
    index.state_dict_metadata[7] = BytesStorageMetadata()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_declare_bytes, "describes 'weight' as bytes"),
        (_declare_tensor, "describes 'optimizer.state/shard_0_1' as a tensor"),
        (_give_size, "gives attributes to the bytes"),
        (_place("../__0_0.distcp", 0, 400), "'../__0_0.distcp', which the manifest does not list"),
        (_place("/etc/passwd", 0, 400), "'/etc/passwd', which the manifest does not list"),
        (_place("__0_0.distcp", 900, 400), "places 400 bytes at 900"),
        (_place("__0_0.distcp", -1, 400), "holds -1 where a size belongs"),
        (_place("__0_0.distcp", True, 400), "holds a bool where a int belongs"),
        (_place("__0_0.distcp", 0, 400, ["zstd"]), "requests a transformation"),
        (_undescribed, "places 'other', which it does not describe"),
        (_grow_chunk, r"has a chunk at \[2, 0\] of \[3, 3\] in \[4, 3\]"),
        (_text_for_size, "holds a str where a Size belongs"),
        (_number_for_name, "holds a int where a str belongs"),
    ],
)
def test_index_of_another_form_is_refused(change: Callable, message: str) -> None:
    index = _index()
    change(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_metadata(pickle.dumps(index), FILES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x80\x04}.", b"\x80\x04K\x01.", b"x" * 99])
def test_damage_is_one_line(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^\.metadata "):
        parse_metadata(content, FILES)
