"""Sources of conversations: windows with a loss mask that never begin inside a conversation."""

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.stream.sources import SourceManifest
from phi4.data.stream.units import ShardPool
from phi4.data.stream.windows import WindowSource
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


def open_conversations(
    config: SourceConfig,
    manifest: SourceManifest,
    pool: ShardPool,
    tokenizer: TokenizerFacts,
    data: DataConfig,
) -> WindowSource:
    """Open a source with a loss mask; see `kinds.OpenKind`.

    Raises:
        DataError: a shard has no loss mask, a conversation has no token in the loss, or the recipe
            allows one to continue in another row.
    """
    if config.overlong == "cut":
        raise DataError(
            f'source {config.name!r}: overlong="cut" would begin a row inside a conversation, '
            'without its question; use overlong="truncate" or "drop", or a longer '
            "data.sequence_length"
        )
    for shard in manifest.shards:
        if not shard.has_mask:
            raise DataError(
                f"source {config.name!r}: {shard.prefix}.bin has no loss mask, so its documents "
                f"are text, not conversations; tokenize rows with `messages`, or set "
                'kind="windows"'
            )
    source = WindowSource.open(config, manifest, pool, tokenizer, data)
    if source.num_without_loss:
        raise DataError(
            f"source {config.name!r}: the loss mask covers no token of {source.num_without_loss} "
            f"of its conversations, the first is {_first_without_loss(manifest, pool)}; tokenize "
            f"the rows again, which lists those without an answer"
        )
    return source


def _first_without_loss(manifest: SourceManifest, pool: ShardPool) -> str:
    for shard in manifest.shards:
        file = pool.open(shard)
        lengths = file.document_lengths()
        begins, labels = np.cumsum(lengths) - lengths, np.maximum(lengths - 1, 1)
        for document in np.flatnonzero(file.num_loss_labels(begins, labels) == 0).tolist():
            return f"document {document} of {shard.prefix}.bin"
    raise AssertionError("the table counts a document without loss")
