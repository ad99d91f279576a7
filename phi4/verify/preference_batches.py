"""Batches of pairs and pivots for parity, in which every split of a batch separates related values.

Answers begin and end anywhere, so pairs span context ranks; rows differ in their number of pairs;
one micro-batch has none, as when a data rank has fewer rows than the others.
"""

import math

import numpy as np

from phi4.config import Recipe
from phi4.data.stream.batch import Batch, build_batch
from phi4.data.stream.pair_batch import with_pairs
from phi4.data.stream.units import PairColumns, Rows

_EOD_ID = 0
_SHORTEST = 4
_PIVOT_SHARE = 0.3


def preference_micro_batches(recipe: Recipe, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """Return the micro-batches of one data rank: every dp_size-th group of rows."""
    rows, tokens_per_pair = _global_rows(recipe, step)
    size = recipe.batch.micro_batch_size
    places = [
        slice(start, start + size)
        for start in range(dp_rank * size, recipe.batch.global_batch_size, dp_size * size)
    ]
    return [
        with_pairs(
            build_batch(
                rows.tokens[place],
                rows.labels[place],
                rows.weights[place],
                eod_id=_EOD_ID,
                starts=rows.starts[place],
            ),
            rows.pair_columns.rows(place),
            tokens_per_pair,
        )
        for place in places
    ]


def _global_rows(recipe: Recipe, step: int) -> tuple[Rows, float]:
    """Return rows of a step, the same for every layout, and the mean number of chosen loss
    tokens."""
    num_rows, length = recipe.batch.global_batch_size, recipe.data.sequence_length
    random = np.random.default_rng([recipe.run.seed, step])
    rows = Rows.empty(num_rows, length, have_pairs=True)
    tokens = random.integers(1, recipe.model.vocab_size, (num_rows, length + 1))
    rows.tokens[:], rows.labels[:], rows.weights[:] = tokens[:, :-1], tokens[:, 1:], 0
    size = recipe.batch.micro_batch_size
    for row in range(num_rows):
        # The last but one micro-batch: it is a data rank's first only if each has just one, and a
        # step without any weight on a rank is not what this tests.
        if num_rows < 4 * size or not num_rows - 2 * size <= row < num_rows - size:
            _fill(rows.cut(row, 0, length), random, recipe.model.vocab_size)
    pairs = rows.pair_columns
    chosen = (pairs.segment_ids >= 0) & (pairs.segment_ids % 2 == 0)
    return rows, float(chosen.sum() / pairs.num_pairs.sum())


def _fill(row: Rows, random: np.random.Generator, vocab_size: int) -> None:
    """Add pairs and pivots until the row is nearly full."""
    length, place, pair = row.tokens.size, 0, 0
    longest = max(_SHORTEST + 1, length // 4)
    while True:
        sizes = random.integers(_SHORTEST, longest + 1, 2)
        if random.random() < _PIVOT_SHARE and pair:
            sizes = sizes[:1]
        if place + sizes.sum() > length:
            break
        if sizes.size == 1:
            added = _add_pivots(row.stretch(place, sizes[0]), pair, random, vocab_size)
        else:
            added = _add_pair(row.stretch(place, sizes.sum()), pair, sizes, random)
        place, pair = place + int(sizes.sum()), pair + added
    if place < length:
        row.starts[place] = True
    row.pair_columns.num_pairs[:] = pair
    counts = np.stack([_counts(row.pair_columns, pair, side) for side in (0, 1)], axis=1)
    typical = -counts * math.log(vocab_size)
    row.pair_columns.reference[0, :pair] = typical + random.normal(0, 1, typical.shape)


def _add_pair(row: Rows, pair: int, sizes: np.ndarray, random: np.random.Generator) -> int:
    """Add two sequences that share a prompt; the loss covers most of what follows it."""
    prompt = int(random.integers(1, sizes.min() - 1))
    begins = (0, int(sizes[0]))
    for side, begin in enumerate(begins):
        row.tokens[begin : begin + prompt] = row.tokens[:prompt]
        row.labels[begin : begin + prompt - 1] = row.tokens[1:prompt]
        answer = np.arange(begin + prompt - 1, begin + sizes[side])
        counted = answer[(random.random(answer.size) < 0.8) | (answer == answer[0])]
        row.weights[counted] = 1
        row.pair_columns.segment_ids[0, counted] = 2 * pair + side
        row.starts[begin] = True
    return 1


def _add_pivots(row: Rows, pair: int, random: np.random.Generator, vocab_size: int) -> int:
    """Add a sequence with alternative labels at up to three positions."""
    positions = np.sort(random.choice(row.tokens.size, random.integers(1, 4), replace=False))
    row.weights[positions] = 1
    row.pair_columns.segment_ids[0, positions] = 2 * (pair + np.arange(positions.size))
    row.pair_columns.alternatives[0, positions] = random.integers(1, vocab_size, positions.size)
    row.starts[0] = True
    return positions.size


def _counts(pairs: PairColumns, num_pairs: int, side: int) -> np.ndarray:
    """Loss tokens of one side of each pair, [num_pairs]."""
    ids = pairs.segment_ids[0]
    counts = np.bincount(ids[ids >= 0], minlength=2 * num_pairs)[side::2]
    if side == 0:
        return counts
    second = ids[pairs.alternatives[0] >= 0] // 2
    return counts + np.bincount(second, minlength=num_pairs)
