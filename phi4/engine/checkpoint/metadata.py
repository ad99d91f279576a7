"""Parse `.metadata`, the index of a checkpoint's records, without executing anything.

torch writes the index as a pickle. Here it is parsed with an unpickler in which every class is an
inert record that only stores its arguments; the index for megatron-core is then rebuilt from the
plain values in these records, each checked for its type and its range. No name in the file is
imported or called, and the file is never unpickled a second time.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import Any

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

from phi4.errors import CheckpointError

METADATA_NAME = ".metadata"

_OPCODES = frozenset(
    (
        *("APPEND", "APPENDS", "BINGET", "BININT", "BININT1", "BININT2", "BINUNICODE"),
        *("BINUNICODE8", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LONG1"),
        *("LONG_BINGET", "MARK", "MEMOIZE", "NEWFALSE", "NEWOBJ", "NEWTRUE", "NONE", "PROTO"),
        *("REDUCE", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STACK_GLOBAL", "STOP"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    )
)
"""All opcodes that torch's writer emits. With others, such as PUT, a few bytes can allocate
gigabytes."""

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_RECORD_NAMES = (
    # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(its class, its name).
    ("builtins", "getattr"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_PLANNER, "SavePlan"),
    (_PLANNER, "TensorWriteData"),
    (_PLANNER, "WriteItem"),
    (_PLANNER, "WriteItemType"),
)
_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int32, torch.int64, torch.uint8),
)
_SHARD_SUFFIX = re.compile(r"/shard_\d+(\.\d+)*_\d+(\.\d+)*")
"""Suffix of a record of bytes, as megatron-core names its ShardedObjects."""


class _Record:
    """Replaces a class that the pickle refers to: stores its arguments, executes nothing."""

    arguments: tuple
    state: Any

    def __new__(cls, *arguments: Any) -> "_Record":
        self = super().__new__(cls)
        self.arguments = arguments
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


_RECORDS = {pair: type(pair[1], (_Record,), {}) for pair in _RECORD_NAMES}
_GLOBALS = _RECORDS | {("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES}
_BY_NAME = {name: record for (_, name), record in _RECORDS.items()}


def parse_metadata(content: bytes, file_bytes: Mapping[str, int]) -> Metadata:
    """Return the index of a checkpoint, from the content of its `.metadata`.

    Args:
        content: content of the file.
        file_bytes: size of each file that the manifest lists, by name.

    Returns:
        Names, shapes and locations of all records; every location is inside a listed file.

    Raises:
        CheckpointError: damaged, or it contains anything that is not part of a checkpoint.
    """
    try:
        for opcode, _, position in pickletools.genops(content):
            if opcode.name not in _OPCODES:
                raise _MalformedError(f"has opcode {opcode.name} at byte {position}")
        unpickler = _InertUnpickler(io.BytesIO(content))
        return _metadata(unpickler.load(), file_bytes)
    except _MalformedError as error:
        raise CheckpointError(f"{METADATA_NAME} {error}; do not load this checkpoint") from None
    except Exception as error:
        # A damaged pickle makes the unpickler raise arbitrary errors.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{METADATA_NAME} cannot be read ({reason}); use another checkpoint"
        ) from None


class _MalformedError(Exception):
    """An error whose message completes a sentence about the file."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # An exact pair: a dotted name would be resolved attribute by attribute, even through `os`.
        if (module, name) not in _GLOBALS:
            raise _MalformedError(f"refers to {module}.{name}, which is not part of a checkpoint")
        return _GLOBALS[module, name]


def _metadata(root: Any, file_bytes: Mapping[str, int]) -> Metadata:
    fields = _fields(root, "Metadata")
    described = _typed(fields.get("state_dict_metadata"), dict)
    stored = _typed(fields.get("storage_data"), dict)
    records = {_typed(name, str): _described(name, value) for name, value in described.items()}
    places = {}
    for key, value in stored.items():
        index = _index(key)
        if index.fqn not in records:
            raise _MalformedError(f"places {index.fqn!r}, which it does not describe")
        if index in places:
            raise _MalformedError(f"places {index.fqn!r} twice")
        places[index] = _place(value, file_bytes)
    return Metadata(state_dict_metadata=records, storage_data=places)


def _described(name: str, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    holds_bytes = type(value) is _BY_NAME["BytesStorageMetadata"]
    if holds_bytes != bool(_SHARD_SUFFIX.search(name)):
        raise _MalformedError(f"describes {name!r} as {'bytes' if holds_bytes else 'a tensor'}")
    if holds_bytes:
        if value.arguments or value.state:
            raise _MalformedError(f"gives attributes to the bytes of {name!r}")
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    size = _size(fields.get("size"))
    chunks = [_chunk(chunk, size) for chunk in _typed(fields.get("chunks"), list)]
    return TensorStorageMetadata(_properties(fields.get("properties")), size, chunks)


def _properties(value: Any) -> TensorProperties:
    _require(value, "TensorProperties")
    # dtype, and four properties that torch no longer uses.
    if type(value.state) is not tuple or len(value.state) != 5 or value.state[0] not in _DTYPES:
        raise _MalformedError("has malformed tensor properties")
    return TensorProperties(dtype=value.state[0])


def _chunk(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    inside = len(offsets) == len(sizes) == len(size) and all(
        offset + length <= whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
    )
    if not inside:
        raise _MalformedError(f"has a chunk at {list(offsets)} of {list(sizes)} in {list(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    name, offset, index = (fields.get(key) for key in ("fqn", "offset", "index"))
    return MetadataIndex(
        _typed(name, str),
        None if offset is None else _size(offset),
        None if index is None else _count(index),
    )


def _place(value: Any, file_bytes: Mapping[str, int]) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    name = _typed(fields.get("relative_path"), str)
    offset, length = _count(fields.get("offset")), _count(fields.get("length"))
    if fields.get("transform_descriptors") is not None:
        raise _MalformedError("requests a transformation of its records")
    if name not in file_bytes:
        raise _MalformedError(f"refers to file {name!r}, which the manifest does not list")
    if offset + length > file_bytes[name]:
        raise _MalformedError(
            f"places {length} bytes at {offset} of {name}, which has {file_bytes[name]}"
        )
    return _StorageInfo(name, offset, length)


def _size(value: Any) -> torch.Size:
    _require(value, "Size")
    (lengths,) = value.arguments if len(value.arguments) == 1 else ((None,),)
    return torch.Size([_count(length) for length in _typed(lengths, tuple)])


def _fields(value: Any, name: str) -> dict:
    _require(value, name)
    if value.arguments:
        raise _MalformedError(f"gives arguments to {name}")
    return _typed(value.state, dict)


def _require(value: Any, name: str) -> None:
    if type(value) is not _BY_NAME[name]:
        raise _MalformedError(f"holds a {type(value).__name__} where a {name} belongs")


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _MalformedError(f"holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _count(value: Any) -> int:
    if _typed(value, int) < 0 or value >= 1 << 63:
        raise _MalformedError(f"holds {value} where a size belongs")
    return value
