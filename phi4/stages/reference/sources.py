"""The recipe's sources of pairs and pivots, row by row in file order."""

from collections.abc import Sequence

from phi4.config import Recipe
from phi4.data.stream.batch import Batch, build_batch
from phi4.data.stream.kinds import open_source
from phi4.data.stream.pair_batch import with_pairs
from phi4.data.stream.pair_source import PairSource
from phi4.data.stream.sources import read_source
from phi4.data.stream.units import Rows, ShardPool
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import ConfigError

KINDS_OF_PAIRS = ("pairs", "pivots")


def open_preferences(recipe: Recipe, tokenizer: TokenizerFacts) -> list[PairSource]:
    """Open every source of pairs or pivots that a recipe trains on or holds out, in the recipe's
    order.

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
            "the recipe has no source of kind pairs or pivots, so there is nothing to cache; add "
            "one to data.sources"
        )
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two sources of pairs are named {name!r}, but the reference cache needs unique "
                f"names; rename the one under data.held_out"
            )
    pool = ShardPool(data.max_open_shards)
    manifests = [read_source(config.path, tokenizer, data.cache_dir) for config in configs]
    opened = [
        open_source(config, manifest, pool, tokenizer, data)
        for config, manifest in zip(configs, manifests, strict=True)
    ]
    pairs = [source for source in opened if isinstance(source, PairSource)]
    assert len(pairs) == len(opened), "sources of these kinds are sources of pairs"
    return pairs


def cache_dir_of(recipe: Recipe) -> str:
    """The directory of the reference cache, which the rules of the stage ask for."""
    assert recipe.data.reference_cache is not None, "a rule of the stage asks for it"
    return recipe.data.reference_cache


def read_batch(
    source: PairSource,
    units: Sequence[int],
    num_rows: int,
    tokenizer: TokenizerFacts,
    *,
    document_mask: bool,
) -> Batch:
    """Read rows of a source as a micro-batch, packed and masked as in training.

    Args:
        source: source of pairs or pivots.
        units: its rows, at most num_rows; the rest of the batch is padding.
        num_rows: number of rows of the batch.
        tokenizer: tokenizer that produced the source's ids.
        document_mask: see `data.document_mask`.

    Returns:
        As `with_pairs` without a loss.

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
    return with_pairs(batch, rows.pair_columns, tokens_per_pair=1.0)
