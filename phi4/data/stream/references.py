"""The reference cache: a reference model's log-probabilities of both sides of every pair.

`phi4 dpo cache-ref` computes them once, and a run reads them instead of holding a second model. A
cache is valid only for the model, the number format, the chat template and the pairs that it was
computed for; an error names what differs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from phi4.data.stream.reference_difference import (
    ItemDifference,
    first_difference,
    weights_difference,
)
from phi4.data.stream.reference_files import (
    FINISHED,
    UNFINISHED,
    PreferenceItems,
    ReferenceManifest,
    SourceReferences,
    array_path,
    array_sha256,
    chat_templates,
)
from phi4.errors import CheckpointError, DataError

RUN_AGAIN = "run `phi4 dpo cache-ref` again with another data.reference_cache"


@dataclass(frozen=True)
class ReferenceCache:
    """A cache on disk, and its comparison with a run.

    Attributes:
        directory: directory of the cache.
        manifest: what it was computed for.
        remedy: ends the message of every error.
    """

    directory: Path
    manifest: ReferenceManifest
    remedy: str = RUN_AGAIN

    def log_probs(self, source_name: str) -> np.ndarray:
        """Return log-probabilities of both sides of each item, [items, 2] float64, memory-mapped.

        Raises:
            DataError: the cache has no such source, or the file is missing or damaged.
        """
        entry = self._entry(source_name)
        return self._load(source_name, "log_probs", (entry.num_items, 2), np.float64)

    def log_probs_of(self, source: PreferenceItems) -> np.ndarray:
        """Return `log_probs` of a source; the content of its items is compared only if their number
        differs, to name the first removed or added item. `check_source` compares all.

        Raises:
            DataError: as `log_probs`, or the number of items differs.
        """
        if self._entry(source.name).num_items != source.num_items:
            self.check_items(source)
        return self.log_probs(source.name)

    def check_model(self, dtype: str, weights: Mapping[str, str]) -> None:
        """Check that the reference model is this one.

        Args:
            dtype: `precision.dtype`.
            weights: as in `ReferenceManifest`.

        Raises:
            CheckpointError: names the number format, or the first tensor that differs.
        """
        self.check_dtype(dtype)
        difference = weights_difference(self.manifest.weights, weights)
        if difference:
            raise CheckpointError(
                f"reference cache {self.directory} is of another model: {difference}; {self.remedy}"
            )

    def check_dtype(self, dtype: str) -> None:
        """Check the number format.

        Raises:
            CheckpointError: it is another.
        """
        if dtype != self.manifest.dtype:
            raise CheckpointError(
                f"reference cache {self.directory} was computed with precision.dtype="
                f"{self.manifest.dtype}, but the recipe has {dtype}; {self.remedy}"
            )

    def check_names(self, names: Iterable[str]) -> None:
        """Check that the cache has exactly these sources.

        Raises:
            DataError: names a source that only one of both has.
        """
        for name in sorted(self.manifest.sources.keys() ^ set(names)):
            has = name in self.manifest.sources
            raise DataError(
                f"source {name!r} is in the {'reference cache' if has else 'recipe'} but not in "
                f"the {'recipe' if has else 'reference cache'} ({self.directory}); {self.remedy}"
            )

    def check_source(self, source: PreferenceItems) -> None:
        """Check that a source is the one that the cache was computed for; reads all of its shards.

        Raises:
            DataError: names the chat template, or the first item that changed, is missing, or is
                new; or the log-probabilities do not match the manifest.
        """
        entry = self._entry(source.name)
        templates = chat_templates(source.manifest)
        if templates != entry.chat_templates:
            raise DataError(
                f"source {source.name!r} was written with chat template {_short(templates)}, but "
                f"the reference cache {self.directory} has {_short(entry.chat_templates)}; "
                f"{self.remedy}"
            )
        self.check_items(source)
        if entry.log_probs_sha256:
            values = np.ascontiguousarray(self.log_probs(source.name))
            self._check_sha256(source.name, "log_probs", values, entry.log_probs_sha256)

    def check_items(self, source: PreferenceItems) -> None:
        """Check the items only; see `check_source`.

        Raises:
            DataError: names the first item that differs.
        """
        entry = self._entry(source.name)
        found = source.item_hashes()
        if found.size == entry.num_items and array_sha256(found) == entry.items_sha256:
            return
        cached = self._load(source.name, "items", (entry.num_items,), np.uint64)
        self._check_sha256(source.name, "items", cached, entry.items_sha256)
        difference = first_difference(cached, found)
        assert difference is not None
        raise DataError(f"{_describe(difference, source)} ({self.directory}); {self.remedy}")

    def _entry(self, source_name: str) -> SourceReferences:
        entry = self.manifest.sources.get(source_name)
        if entry is None:
            raise DataError(
                f"reference cache {self.directory} has no source {source_name!r}; it has "
                f"{', '.join(map(repr, sorted(self.manifest.sources)))}; {self.remedy}"
            )
        return entry

    def _load(
        self, source_name: str, what: Literal["items", "log_probs"], shape: tuple, dtype: type
    ) -> np.ndarray:
        path = array_path(self.directory, source_name, what)
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} cannot be read ({reason}); {self.remedy}") from None
        if values.shape != shape or values.dtype != dtype:
            raise DataError(
                f"{path} holds {values.dtype} {values.shape}, expected {np.dtype(dtype)} {shape}; "
                f"{self.remedy}"
            )
        return values

    def _check_sha256(
        self,
        source_name: str,
        what: Literal["items", "log_probs"],
        values: np.ndarray,
        expected: str,
    ) -> None:
        if array_sha256(values) != expected:
            raise DataError(
                f"{array_path(self.directory, source_name, what)} has another sha256 than its "
                f"manifest; {self.remedy}"
            )


def open_references(cache_dir: str | Path) -> ReferenceCache:
    """Open a finished cache.

    Raises:
        DataError: there is none, it is unfinished, or its manifest is damaged.
    """
    directory = Path(cache_dir)
    cache = read_cache(directory, FINISHED)
    if cache is not None:
        return cache
    if (directory / UNFINISHED).exists():
        raise DataError(
            f"reference cache {directory} is unfinished; run `phi4 dpo cache-ref` again with this "
            f"recipe to complete it"
        )
    raise DataError(
        f"data.reference_cache={directory} has no {FINISHED}; run `phi4 dpo cache-ref` with this "
        "recipe first"
    )


def read_cache(directory: Path, name: str, remedy: str = RUN_AGAIN) -> ReferenceCache | None:
    """Read the cache with one of its two manifests; None if there is no such file.

    Raises:
        DataError: the manifest is damaged.
    """
    path = directory / name
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ReferenceManifest)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} is not a manifest of a reference cache ({error}); {remedy}"
        ) from None
    return ReferenceCache(directory, manifest, remedy)


def _describe(difference: ItemDifference, source: PreferenceItems) -> str:
    item = difference.item
    if difference.kind == "missing":
        place = (
            f"its place now holds {source.locate_item(item)}"
            if item < source.num_items
            else "the source ends before it"
        )
        return f"source {source.name!r}: item {item} of the reference cache is missing; {place}"
    where = f"item {item} ({source.locate_item(item)})"
    return {
        "new": f"{where} is new: the reference cache does not have it",
        "changed": f"{where} is not what the reference cache was computed for",
        "moved": f"{where} is at another position in the reference cache",
    }[difference.kind]


def _short(templates: tuple[str | None, ...]) -> str:
    return ", ".join((template or "none")[:12] for template in templates) or "none"
