"""Files that a blend holds more than once, found by the hashes of their manifests.

The ledger keeps sources apart by name, so tokens under two names are drawn for each of them. That
may be meant, as with long documents that also stand in the whole: it is said, not refused.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import combinations

from phi4.data.stream.sources import SourceManifest


def describe_overlaps(manifests: Mapping[str, SourceManifest]) -> list[str]:
    """A line for each source that holds a shard twice and each two that share some.

    Args:
        manifests: by source name.
    """
    shards = {
        name: Counter(shard.manifest_sha256 for shard in manifest.shards)
        for name, manifest in manifests.items()
    }
    sizes = {
        shard.manifest_sha256: shard.num_tokens
        for manifest in manifests.values()
        for shard in manifest.shards
    }
    lines = []
    for name, counts in sorted(shards.items()):
        repeated = sum((count - 1) * sizes[sha] for sha, count in counts.items())
        if repeated:
            lines.append(
                f"source {name!r}: {_share(repeated, manifests[name])} of its tokens are copies of "
                "others of its own; an epoch draws them more than once"
            )
    names_of: dict[str, list[str]] = {}
    for name, counts in sorted(shards.items()):
        for sha in counts:
            names_of.setdefault(sha, []).append(name)
    common: Counter[tuple[str, str]] = Counter()
    for sha, names in names_of.items():
        for pair in combinations(names, 2):
            common[pair] += sizes[sha]
    lines += [
        f"sources {a!r} and {b!r} share files, {_share(tokens, manifests[a])} of the tokens of the "
        f"one and {_share(tokens, manifests[b])} of the other; each draws them in its own epochs"
        for (a, b), tokens in sorted(common.items())
        if tokens
    ]
    return lines


def _share(num_tokens: int, manifest: SourceManifest) -> str:
    return f"{num_tokens / sum(shard.num_tokens for shard in manifest.shards):.0%}"
