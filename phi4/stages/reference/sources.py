"""The sources of pairs and pivots of a recipe, row by row in the order of their files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from phi4.config import Recipe
from phi4.data.stream.batch import Batch, build_batch
from phi4.data.stream.kinds import open_source
from phi4.data.stream.sources import SourceManifest, read_source
from phi4.data.stream.units import Rows, ShardPool
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import ConfigError

KINDS_OF_PAIRS = ("pairs", "pivots")


class PreferenceSource(Protocol):
    """A source of pairs or pivots, called items; see `phi4.data.stream.stream.Source`.

    Attributes:
        name: as in the recipe.
        num_units: rows.
        row_tokens: tokens in a row.
        num_items: of all shards, numbered in the order of the files.
        manifest: its shards.
    """

    name: str
    num_units: int
    row_tokens: int
    num_items: int
    manifest: SourceManifest

    def fill(self, unit: int, rows: Rows) -> None:
        """Copy one row into slices of [row_tokens], its pairs into `rows.pairs`."""

    def row_items(self, unit: int) -> np.ndarray:
        """Item of each pair of a row, in the order of its segments, [pairs] int64."""

    def item_hashes(self) -> np.ndarray:
        """64 bits of the content of each item, [num_items] uint64; reads all shards."""

    def locate_item(self, item: int) -> str:
        """Source, file and document behind an item, in words."""


def open_preferences(recipe: Recipe, tokenizer: TokenizerFacts) -> list[PreferenceSource]:
    """Every source of pairs or pivots that a recipe trains on or holds out, in its order.

    They are opened without their reference log-probabilities.

    Raises:
        ConfigError: there is none, or two have one name.
        DataError: a source is missing, damaged or from another tokenizer.
    """
    data = recipe.data.model_copy(update={"reference_cache": None})
    configs = [c for c in (*data.sources, *data.held_out) if c.kind in KINDS_OF_PAIRS]
    names = [config.name for config in configs]
    if not names:
        raise ConfigError(
            "the recipe has no source of kind pairs or pivots, so there is nothing to cache; name "
            "one under data.sources"
        )
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two sources of pairs are named {name!r}, and the reference cache finds a source "
                "by its name; name the one under data.held_out otherwise"
            )
    pool = ShardPool(data.max_open_shards)
    manifests = [read_source(config.path, tokenizer, data.cache_dir) for config in configs]
    return [
        open_source(config, manifest, pool, tokenizer, data)
        for config, manifest in zip(configs, manifests, strict=True)
    ]


def read_batch(
    source: PreferenceSource,
    units: Sequence[int],
    num_rows: int,
    tokenizer: TokenizerFacts,
    *,
    document_mask: bool,
) -> Batch:
    """Rows of a source as a micro-batch, packed and masked as in training.

    Args:
        source: of pairs or pivots.
        units: its rows, at most num_rows; padding fills what they leave.
        num_rows: of the batch.
        tokenizer: whose ids the source holds.
        document_mask: see `data.document_mask`.

    Returns:
        Segments 2i and 2i + 1 are those of pair i, counted over the rows in order.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    rows = Rows.empty(num_rows, source.row_tokens, have_pairs=True)
    for row in range(num_rows):
        cut = rows.cut(row, 0, source.row_tokens)
        if row < len(units):
            source.fill(units[row], cut)
        else:
            cut.starts[0] = True
            cut.pad(0, tokenizer.pad_id)
    batch = build_batch(
        rows.tokens,
        rows.labels,
        rows.weights,
        eod_id=tokenizer.eod_id,
        document_mask=document_mask,
        starts=rows.starts,
    )
    num_pairs, ids = rows.pairs.num_pairs, rows.pairs.segment_ids.astype(np.int64)
    first_BS = 2 * (np.cumsum(num_pairs) - num_pairs)[:, None]
    alternatives = rows.pairs.alternatives
    return replace(
        batch,
        segment_ids=np.where(ids >= 0, ids + first_BS, -1),
        num_segments=2 * int(num_pairs.sum()),
        alternative_labels=alternatives if (alternatives >= 0).any() else None,
    )
