"""The shards of a source, in order, and one manifest for all of them.

A recipe gives a prefix, a glob of prefixes, or a list file. The manifests of many shards are read
once and stored as one source manifest, so a start opens no shard and reads one file per source.
"""

import hashlib
import os
from glob import glob
from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.manifest import FileKind, encode_manifest, manifest_path, read_manifest
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import LIST_SUFFIX
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


class SourceShard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `.bin/.idx` pair, as its manifest describes it."""

    prefix: str
    num_documents: int
    num_tokens: int
    has_mask: bool
    """Whether the loss excludes some of its tokens, as for conversations and pairs."""
    kind: FileKind = "documents"
    manifest_sha256: str
    manifest_mtime_ns: int


class SourceManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All shards of a source, in order."""

    format_version: int = 1
    path: str
    tokenizer_fingerprint: str
    vocab_size: int
    shards: tuple[SourceShard, ...]

    @property
    def content_hash(self) -> str:
        """sha256 over the shards' manifests: identifies the content, independent of paths."""
        joined = "\n".join(shard.manifest_sha256 for shard in self.shards)
        return hashlib.sha256(joined.encode()).hexdigest()


def read_source(
    path: str, tokenizer: TokenizerFacts, cache_dir: str | None = None
) -> SourceManifest:
    """Read the manifest of a source; that of several shards is cached.

    If the cache is not writable, the shards' manifests are read at every start.

    Args:
        path: a prefix; a glob of prefixes, in sorted order; or a `.list` file with a prefix per
            line, relative to the file, in its order.
        tokenizer: tokenizer that must have produced the shards.
        cache_dir: directory of the cached manifest; next to the shards if None.

    Raises:
        DataError: no shard, a shard without manifest, or ids of another tokenizer.
    """
    prefixes = shard_prefixes(path)
    kept = _kept_at(path, cache_dir)
    manifest = _read_kept(kept, prefixes) if kept else None
    if manifest is None:
        manifest = _read_shards(path, prefixes)
        if kept and os.access(kept.parent, os.W_OK):
            write_atomically(kept, encode_manifest(manifest))
    _check_tokenizer(manifest, tokenizer)
    return manifest


def shard_prefixes(path: str) -> list[str]:
    """Return the pairs at the path of a source, in order.

    Args:
        path: as in `read_source`.

    Raises:
        DataError: it matches no pair, or one twice.
    """
    if path.endswith(LIST_SUFFIX):
        prefixes = _listed(Path(path))
    elif _is_glob(path):
        prefixes = sorted(found.removesuffix(".bin") for found in glob(f"{path}.bin"))
    else:
        return [path]
    if not prefixes:
        raise DataError(f"{path} matches no shard; expected prefixes of .bin/.idx pairs")
    if len(set(prefixes)) < len(prefixes):
        twice = next(p for p in prefixes if prefixes.count(p) > 1)
        raise DataError(f"{path} lists {twice} twice; its tokens would count twice: list it once")
    return prefixes


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as a list of shards ({error}); give a UTF-8 file with a prefix "
            f"a line"
        ) from None
    return [str(path.parent / line.strip()) for line in lines if line.strip()]


def _is_glob(path: str) -> bool:
    """Return whether a path is a glob pattern; if a pair of exactly that name exists, it is a
    prefix."""
    return _has_wildcard(path) and not os.path.exists(f"{path}.bin")


def _has_wildcard(path: str) -> bool:
    return any(character in path for character in "*?[")


def _kept_at(path: str, cache_dir: str | None) -> Path | None:
    """Return the path of the source manifest; None for a single pair, which has its own
    manifest."""
    if cache_dir and (path.endswith(LIST_SUFFIX) or _is_glob(path)):
        return Path(cache_dir) / f"{_name(os.path.abspath(path))}.source.json"
    if path.endswith(LIST_SUFFIX):
        return Path(f"{path}.source.json")
    if not _is_glob(path):
        return None
    whole = Path(path)
    parts = whole.parts
    first = next(i for i, part in enumerate(parts) if _has_wildcard(part))
    pattern = "/".join(parts[first:])
    return Path(*parts[:first]) / f"{_name(pattern)}.source.json"


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_kept(path: Path, prefixes: list[str]) -> SourceManifest | None:
    """Return the cached manifest if it describes exactly these shards."""
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=SourceManifest)
    except (OSError, msgspec.DecodeError):
        return None
    if [shard.prefix for shard in manifest.shards] != prefixes:
        return None
    written = (_mtime_ns(prefix) for prefix in prefixes)
    same = all(s.manifest_mtime_ns == t for s, t in zip(manifest.shards, written, strict=True))
    return manifest if same else None


def _read_shards(path: str, prefixes: list[str]) -> SourceManifest:
    shards, writers = [], {}
    for prefix in prefixes:
        written = _mtime_ns(prefix)
        # A single pair is opened, so that errors are found at once. With many, each is checked when
        # it is first used; one without a manifest is opened for its error message.
        manifest = read_manifest(prefix) if len(prefixes) > 1 else None
        manifest = manifest or TokenFile(prefix).manifest()
        writers[manifest.tokenizer_fingerprint, manifest.vocab_size] = prefix
        shards.append(
            SourceShard(
                prefix=prefix,
                num_documents=manifest.num_documents,
                num_tokens=manifest.num_tokens,
                has_mask=manifest.mask_sha256 is not None,
                kind=manifest.kind,
                manifest_sha256=hashlib.sha256(manifest_path(prefix).read_bytes()).hexdigest(),
                manifest_mtime_ns=written,
            )
        )
    if len(writers) > 1:
        raise DataError(
            f"{path}: {' and '.join(list(writers.values())[:2])} were written by different "
            "tokenizers; tokenize one of them again"
        )
    ((fingerprint, vocab_size),) = writers
    return SourceManifest(
        path=path, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size, shards=tuple(shards)
    )


def _mtime_ns(prefix: str) -> int:
    try:
        return manifest_path(prefix).stat().st_mtime_ns
    except OSError:
        return 0


def _check_tokenizer(manifest: SourceManifest, tokenizer: TokenizerFacts) -> None:
    found, expected = manifest.tokenizer_fingerprint, tokenizer.fingerprint
    if found != expected:
        raise DataError(
            f"{manifest.path} was written by tokenizer {found[:12]}, but the recipe's is "
            f"{expected[:12]}; tokenize the source again or set its tokenizer in the recipe"
        )
