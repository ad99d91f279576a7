"""manifest.json: size and sha256 of every file of a checkpoint, its layout and its recipe's hash.

A checkpoint is read only after its files have been checked against its manifest. A manifest is not
a signature: anyone who can change a file can change its hash, so the content is validated as well.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from phi4.config import Recipe, identity_hash
from phi4.config.schema import key_kinds
from phi4.errors import CheckpointError
from phi4.rundir.names import MANIFEST_FILE

FORMAT_VERSION = 2
"""Version 2 omits the empty records of layers that have no extra state."""
_READ_VERSIONS = (1, 2)
LAYOUT_KEYS = frozenset(
    ("tensor", "pipeline", "virtual_pipeline", "context", "data", "distributed_optimizer", "cuda")
)

OptimizerFormat = Literal["full", "dp", "none"]


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a complete checkpoint contains."""

    version: int = FORMAT_VERSION
    step: int
    optimizer_format: OptimizerFormat
    layout: dict[str, int]
    """Layout of the run that wrote it, by LAYOUT_KEYS."""
    recipe_sha256: str
    """Identity hash of the recipe."""
    identity_keys_sha256: str = ""
    """Hash of the names of the recipe's identity keys; recipe_sha256 is meaningless to a phi4
    version with other keys. Version 1 has none."""
    data: dict[str, str]
    """CheckpointManifest hash of every data source."""
    files: dict[str, FileEntry]


def read_manifest(directory: Path) -> CheckpointManifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: missing, malformed, of another version, or it lists files outside the
            checkpoint.
    """
    path = directory / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST_FILE}; it is not complete") from None


def parse_manifest(content: bytes, path: Path) -> CheckpointManifest:
    """Return a manifest from the bytes of its file.

    Raises:
        CheckpointError: as `read_manifest`; the message has the path.
    """
    try:
        manifest = msgspec.json.decode(content, type=CheckpointManifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; use another checkpoint") from None
    if manifest.version not in _READ_VERSIONS:
        raise CheckpointError(
            f"{path} has version {manifest.version}; this phi4 reads up to {FORMAT_VERSION}; use "
            f"the phi4 that wrote it"
        )
    if manifest.layout.keys() != LAYOUT_KEYS:
        raise CheckpointError(
            f"{path} has the layout keys {', '.join(sorted(manifest.layout))}, expected "
            f"{', '.join(sorted(LAYOUT_KEYS))}; use another checkpoint"
        )
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\0" in name or not parts:
            raise CheckpointError(
                f"{path} lists {name!r}, which is not a file of the checkpoint; use another one"
            )
    return manifest


def identity_keys_hash() -> str:
    """sha256 of the names of the recipe's identity keys."""
    names = sorted(name for name, kind in key_kinds().items() if kind == "identity")
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def check_recipe(checkpoint: Path, manifest: CheckpointManifest, recipe: Recipe) -> None:
    """Check that a checkpoint's recipe matches its manifest.

    Raises:
        CheckpointError: it does not match.
    """
    comparable = manifest.identity_keys_sha256 == identity_keys_hash()
    if comparable and manifest.recipe_sha256 != identity_hash(recipe):
        raise CheckpointError(
            f"the recipe in {checkpoint} does not match its {MANIFEST_FILE}; use another checkpoint"
        )


def entry_of(content: bytes) -> FileEntry:
    """Return size and hash of a file with this content."""
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def content_names(directory: Path) -> list[str]:
    """Return every file under a checkpoint except the manifest, sorted, relative."""
    found = (path for path in directory.rglob("*") if path.is_file())
    names = (str(path.relative_to(directory)) for path in found)
    return sorted(name for name in names if name != MANIFEST_FILE)


def verify_files(directory: Path, manifest: CheckpointManifest, names: Iterable[str]) -> list[str]:
    """Return one line per named file that is missing or has the wrong size or hash."""
    problems = []
    for name in names:
        expected, path = manifest.files[name], directory / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif not path.resolve().is_relative_to(directory.resolve()):
            problems.append(f"{path} is a link to a file outside the checkpoint")
        elif path.stat().st_size != expected.bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, expected {expected.bytes}")
        elif _size_and_hash(path)[1] != expected.sha256:
            problems.append(f"{path} has another sha256 than its manifest lists")
    return problems


def read_verified(directory: Path, manifest: CheckpointManifest, name: str) -> bytes:
    """Return the content of a small file, verified in memory, so that it cannot change after the
    check.

    Raises:
        CheckpointError: not listed, missing, or different from the manifest.
    """
    path, expected = directory / name, manifest.files.get(name)
    if expected is None:
        raise CheckpointError(f"{directory / MANIFEST_FILE} does not list {name}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    content = path.read_bytes()
    if entry_of(content) != expected:
        raise CheckpointError(f"{path} has another size or sha256 than its manifest lists")
    return content


def manifest_hash(directory: Path) -> str:
    """Return the sha256 of the manifest, or an empty string if there is none."""
    path = directory / MANIFEST_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _size_and_hash(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
