"""Find files that a blend contains more than once, by the hashes of their manifests.

The ledger distinguishes sources by name, so tokens under two names are drawn for each of them. That
may be intended, for example for long documents that are also in the full set: it is reported, not
refused.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import combinations

from phi4.data.stream.sources import SourceManifest


def describe_overlaps(manifests: Mapping[str, SourceManifest]) -> list[str]:
    """Return a line for each source that has a shard twice and each two that share some.

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
                f"source {name!r}: {_share(repeated, manifests[name])} of its tokens are "
                f"duplicates within the source; an epoch draws them more than once"
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
        f"sources {a!r} and {b!r} share files, {_share(tokens, manifests[a])} of the first one's "
        f"tokens and {_share(tokens, manifests[b])} of the second's; each source draws them in its "
        f"own epochs"
        for (a, b), tokens in sorted(common.items())
        if tokens
    ]
    return lines


def _share(num_tokens: int, manifest: SourceManifest) -> str:
    return f"{num_tokens / sum(shard.num_tokens for shard in manifest.shards):.0%}"
