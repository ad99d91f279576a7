"""manifest.json: size and sha256 of every file of a checkpoint, and what it belongs to.

A checkpoint is read only after its manifest holds. `.metadata` is a pickle; it is parsed here by an
unpickler that admits nothing but the checkpoint format's own record types.
"""

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from phi4.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
METADATA_NAME = ".metadata"
FORMAT_VERSION = 1

_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_METADATA_GLOBALS = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("torch", "float64"),
    ("torch", "int32"),
    ("torch", "int64"),
    ("torch", "uint8"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a complete checkpoint contains."""

    version: int = FORMAT_VERSION
    step: int
    optimizer_format: str
    """full, dp or none."""
    layout: dict[str, int]
    """tensor, pipeline, virtual_pipeline, context, data of the run that wrote it."""
    recipe_sha256: str
    """Identity hash of the recipe."""
    data: dict[str, str]
    """Manifest hash of every data source."""
    files: dict[str, FileEntry]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: missing, not JSON of this form, or of another version.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST_NAME}; it is not complete") from None
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if manifest.version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has version {manifest.version}; this phi4 reads {FORMAT_VERSION}"
        )
    return manifest


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and hash of the named files."""
    return {name: FileEntry(*_size_and_hash(directory / name)) for name in names}


def content_names(directory: Path) -> list[str]:
    """Every file under a checkpoint but the manifest, sorted, relative."""
    found = (path for path in directory.rglob("*") if path.is_file())
    names = (str(path.relative_to(directory)) for path in found)
    return sorted(name for name in names if name != MANIFEST_NAME)


def verify_files(directory: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """One line per named file that is missing, has another size or another hash."""
    problems = []
    for name in names:
        expected, path = manifest.files[name], directory / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected.bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, expected {expected.bytes}")
        elif _size_and_hash(path)[1] != expected.sha256:
            problems.append(f"{path} has another sha256 than its manifest says")
    return problems


def check_metadata(directory: Path) -> None:
    """Parse `.metadata` with the restricted unpickler.

    Raises:
        CheckpointError: it names anything but the format's record types, or is damaged.
    """
    path = directory / METADATA_NAME
    try:
        with path.open("rb") as stream:
            _MetadataUnpickler(stream, path).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module in _METADATA_MODULES or (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self._path} names {module}.{name}, which no checkpoint needs; do not load it"
        )


def _size_and_hash(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
