"""Packed pairs, and a preference over them that mixes what could go wrong apart."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from phi4.data.stream.batch import Batch, build_batch
from phi4.engine.objective import Loss, LossInputs, SegmentSum

LENGTH, VOCABULARY, EOD = 32, 96, 0
NUM_MICRO_BATCHES, NUM_ROWS = 4, 2
WITHOUT_SEGMENTS = 1
"""The micro-batch that has none; the first of a data rank where there are two."""


def pairs(step: int, index: int) -> Batch:
    """A micro-batch of packed pairs, answers of any length, none at all in one of them."""
    random = np.random.default_rng([step, index])
    tokens = random.integers(1, VOCABULARY, (NUM_ROWS, LENGTH + 1))
    starts = np.zeros((NUM_ROWS, LENGTH), dtype=bool)
    segment_ids = np.full((NUM_ROWS, LENGTH), -1)
    num_segments = 0
    for row in range(NUM_ROWS):
        for begin, end in ((0, 14 + index), (14 + index, LENGTH - index)):
            answer = begin + random.integers(2, 6)
            starts[row, begin] = True
            segment_ids[row, answer:end] = num_segments
            num_segments += 1
    alternatives = random.integers(0, VOCABULARY, (NUM_ROWS, LENGTH))
    # In one micro-batch most ranks have none.
    columns = 3 if index == 0 else LENGTH
    alternatives[random.random(alternatives.shape) < 0.8] = -1
    alternatives[:, columns:] = -1
    alternatives[0, 1] = 7
    batch = build_batch(
        tokens[:, :-1], tokens[:, 1:], np.ones((NUM_ROWS, LENGTH)), eod_id=EOD, starts=starts
    )
    share = random.random((NUM_ROWS, LENGTH)).astype(np.float32)
    if index == WITHOUT_SEGMENTS:
        nothing = {"token_extras": {"share": share * 0}, "segment_extras": {"ref": np.zeros(0)}}
        return replace(batch, **nothing)
    return replace(
        batch,
        segment_ids=segment_ids,
        num_segments=num_segments,
        alternative_labels=alternatives,
        token_extras={"share": share},
        segment_extras={"ref": random.normal(-40, 8, num_segments)},
    )


def num_pairs() -> float:
    return sum(pairs(0, index).num_segments for index in range(NUM_MICRO_BATCHES)) / 2


class Preference:
    """Segment 2i over 2i + 1, more likely tokens of a share, pivots over their alternatives."""

    metric_names = ("margins",)
    gradient = "any"

    def __init__(self, pairs: bool = True, likelihood: bool = True, pivots: bool = True) -> None:
        self.terms = pairs, likelihood, pivots

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        pairs, likelihood, pivots = self.terms
        log_probs_BS = inputs.log_probs_BS
        rewards_N = 0.1 * (segment_sum(log_probs_BS) - inputs.segment_extras["ref"])
        margins_P = rewards_N[0::2] - rewards_N[1::2]
        num_pairs = inputs.segment_total(torch.ones_like(margins_P))
        loss = pairs * inputs.segment_total(-F.logsigmoid(margins_P))
        if likelihood:
            loss = loss - 0.05 * inputs.token_total(log_probs_BS * inputs.token_extras["share"])
        if pivots and inputs.alternative_mask_BS is not None:
            gaps_BS = log_probs_BS - inputs.alternative_log_probs_BS
            chosen_BS = -F.logsigmoid(0.3 * gaps_BS) * inputs.alternative_mask_BS
            loss = loss + inputs.token_total(chosen_BS)
        return Loss(loss, num_pairs, {"margins": (inputs.segment_total(margins_P), num_pairs)})
