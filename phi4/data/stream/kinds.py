"""The kinds of source, by `kind` in the recipe; a new kind is a class that is a `Source` and an
entry here."""

from collections.abc import Mapping
from typing import Protocol

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.manifest import FileKind
from phi4.data.stream.conversations import open_conversations
from phi4.data.stream.pair_source import PairSource
from phi4.data.stream.sources import SourceManifest
from phi4.data.stream.stream import Source
from phi4.data.stream.units import ShardPool, UnitSource
from phi4.data.stream.windows import WindowSource
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


class OpenKind(Protocol):
    """Opens sources of one kind."""

    def __call__(
        self,
        config: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        data: DataConfig,
    ) -> Source:
        """Open a source.

        Args:
            config: the source in the recipe.
            manifest: its shards.
            pool: opens them.
            tokenizer: tokenizer that produced their ids.
            data: settings shared by all sources: lengths of rows and units, cache_dir.

        Raises:
            DataError: this kind cannot use the shards.
        """


KINDS: Mapping[str, OpenKind] = {
    "stream": UnitSource.open,
    "windows": WindowSource.open,
    "conversations": open_conversations,
    "pairs": PairSource.open,
    "pivots": PairSource.open,
}
_OTHER_FILES: Mapping[str, FileKind] = {"pairs": "pairs", "pivots": "pivots"}


def open_source(
    config: SourceConfig,
    manifest: SourceManifest,
    pool: ShardPool,
    tokenizer: TokenizerFacts,
    data: DataConfig,
) -> Source:
    """Open a source according to its kind; see `OpenKind`.

    Raises:
        DataError: its files are of another kind; or as the kind's opener.
    """
    expected = _OTHER_FILES.get(config.kind, "documents")
    for shard in manifest.shards:
        if shard.kind != expected:
            fitting = "conversations or windows" if shard.kind == "documents" else shard.kind
            raise DataError(
                f"source {config.name!r} has kind={config.kind}, but {shard.prefix}.bin holds "
                f"{shard.kind}; set kind to {fitting}, or give files of {expected}"
            )
    return KINDS[config.kind](config, manifest, pool, tokenizer, data)
