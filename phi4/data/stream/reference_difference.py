"""Describe the differences between a reference cache and the run that wants to use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class ItemDifference:
    """The first item in which a source differs from the cache.

    Attributes:
        kind: missing from the source, new in it, changed in place, or moved to another place.
        item: its number in the cache if it is missing, else in the source.
    """

    kind: Literal["missing", "new", "changed", "moved"]
    item: int


def weights_difference(cached: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Describe what differs between two models, with a tensor's name; empty if nothing does."""
    only_one = sorted(cached.keys() ^ found.keys())
    if only_one:
        owner = "the cache's" if only_one[0] in cached else "this"
        return f"only {owner} model has tensor {only_one[0]}"
    changed = [name for name in sorted(cached) if cached[name] != found[name]]
    if not changed:
        return ""
    first = changed[0]
    more = f" and {len(changed) - 1} more" if changed[1:] else ""
    return f"tensor {first}{more} (sha256 {found[first][:12]}, in the cache {cached[first][:12]})"


def first_difference(cached: np.ndarray, found: np.ndarray) -> ItemDifference | None:
    """Return the first difference between two lists of item hashes; None if they are equal.

    Args:
        cached: [items] of the cache.
        found: [items] of the source now.
    """
    common = min(cached.size, found.size)
    parted = np.flatnonzero(cached[:common] != found[:common])
    if not parted.size:
        if cached.size == found.size:
            return None
        return ItemDifference("missing" if cached.size > found.size else "new", common)
    place = int(parted[0])
    is_missing = not np.isin(cached[place], found[place:]).item()
    is_new = not np.isin(found[place], cached[place:]).item()
    # If the items after it are shifted by one, it was removed or added; otherwise it was replaced.
    if is_missing and not is_new:
        return ItemDifference("missing", place)
    if is_new and not is_missing:
        return ItemDifference("new", place)
    if not is_new:
        return ItemDifference(_of_duplicates(cached.size, found.size), place)
    return ItemDifference("changed", place)


def _of_duplicates(num_cached: int, num_found: int) -> Literal["missing", "new", "moved"]:
    """Both hashes occur again later: items moved, or one of several equal items was added or
    removed."""
    if num_cached == num_found:
        return "moved"
    return "missing" if num_cached > num_found else "new"
