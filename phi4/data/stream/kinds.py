"""The kinds of source, by `kind` in the recipe: a class that is a `Source`, and a line here."""

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
            tokenizer: whose ids they hold.
            data: what all sources share: lengths of rows and units, cache_dir.

        Raises:
            DataError: the shards hold nothing that this kind can serve.
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
    """Open a source as what its kind says; see `OpenKind`.

    Raises:
        DataError: its files are of another kind; or of the kind that opens it.
    """
    expected = _OTHER_FILES.get(config.kind, "documents")
    for shard in manifest.shards:
        if shard.kind != expected:
            fitting = "conversations or windows" if shard.kind == "documents" else shard.kind
            raise DataError(
                f"source {config.name!r} has kind={config.kind}, and {shard.prefix}.bin holds "
                f"{shard.kind}; set kind to {fitting}, or name files of {expected}"
            )
    return KINDS[config.kind](config, manifest, pool, tokenizer, data)
