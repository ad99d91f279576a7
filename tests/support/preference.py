"""Packed pairs and pivots that are hard on layouts, and a preference that also reads tokens."""

from dataclasses import replace

import numpy as np

from phi4.config import DpoConfig
from phi4.data.stream.batch import Batch
from phi4.engine.objective import Loss, LossInputs, SegmentSum
from phi4.stages.dpo import PreferenceLoss
from tests.support import pair_rows
from tests.support.pair_rows import Pair, Row, Trajectory, mean_chosen_tokens, pair_batch

LENGTH, VOCABULARY = 32, 96
NUM_MICRO_BATCHES, NUM_ROWS = 4, 2
WITHOUT_SEGMENTS = 1
"""The micro-batch that has none; the first of a data rank where there are two."""


def drawn_pair(random: np.random.Generator, prompt: int, chosen: int, rejected: int) -> Pair:
    """A pair of answers of so many tokens; its margin begins near 6, so that it does not cancel."""
    ids = random.integers(1, VOCABULARY, prompt + chosen + rejected)
    reference = random.normal([-4.5 * chosen - 6, -4.5 * rejected])
    return Pair(*np.split(ids, [prompt, prompt + chosen]), tuple(reference))


def drawn_trajectory(random: np.random.Generator, length: int, positions: list[int]) -> Trajectory:
    """A document of so many tokens with pivots."""
    chosen, rejected = random.integers(1, VOCABULARY, (2, len(positions)))
    references = random.normal(-4.5, 1, (len(positions), 2))
    ids = random.integers(1, VOCABULARY, length)
    return Trajectory(ids, np.array(positions), chosen, rejected, references)


def rows(step: int, index: int) -> list[Row]:
    """Items of a micro-batch: answers of any length, none at all in one of them."""
    random = np.random.default_rng([step, index])
    if index == WITHOUT_SEGMENTS:
        return [[], []]
    pair = drawn_pair(random, 5, 3 + index, 7 - index)
    if index == 0:
        # Most ranks have no pivot in it.
        return [[drawn_trajectory(random, 6, [0, 2]), pair], [drawn_pair(random, 3, 11, 9)]]
    trajectory = drawn_trajectory(random, 10, [1, 4, 9 - index])
    return [[pair, trajectory], [trajectory, drawn_pair(random, 4, 2 * index, 3)]]


def pairs(step: int, index: int) -> Batch:
    """A micro-batch of `rows`, with a share of each token for the loss.

    Some tokens of no segment weigh as much as those of answers; the preference leaves them out.
    """
    tokens_per_pair = mean_chosen_tokens(
        [row for other in range(NUM_MICRO_BATCHES) for row in rows(step, other)]
    )
    batch = pair_batch(rows(step, index), LENGTH, tokens_per_pair)
    random = np.random.default_rng([step, index, 1])
    share = random.random((NUM_ROWS, LENGTH)).astype(np.float32)
    if index == WITHOUT_SEGMENTS:
        return replace(batch, segment_ids=None, token_extras={"share": share * 0})
    mask = batch.loss_mask + (batch.segment_ids < 0) * (share < 0.5)
    return replace(batch, loss_mask=mask.astype(np.float32), token_extras={"share": share})


def num_pairs() -> int:
    return sum(pair_rows.num_pairs(rows(0, index)) for index in range(NUM_MICRO_BATCHES))


class Preference(PreferenceLoss):
    """The stage's, with an sft term, and more likely tokens of a share."""

    def __init__(self, loss: str = "sigmoid", sft_weight: float = 0.2, share: float = 0.05) -> None:
        super().__init__(DpoConfig(loss=loss, sft_weight=sft_weight))
        self.share = share

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        loss = super().__call__(inputs, segment_sum)
        likelihood = inputs.token_total(inputs.log_probs_BS * inputs.token_extras["share"])
        return replace(loss, loss_sum=loss.loss_sum - self.share * likelihood)
