"""The law of every stage's loss: sums over micro-batches are the sums over everything.

A new stage is tested here by being in STAGES.
"""

from itertools import pairwise

import pytest
import torch

from phi4.engine.objective import Loss, LossInputs
from phi4.stages import STAGES, stage_of
from phi4.stages.pretrain import NextToken
from tests.support.engines import tiny_recipe

ROWS, COLUMNS, ROW_SEGMENTS = 6, 8, 2


def rows(first: int, last: int) -> LossInputs:
    """Rows [first, last) of one draw; two segments in each, the mask of row 2 is empty."""
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(ROWS, COLUMNS, generator=generator) * 5
    mask = (torch.rand(ROWS, COLUMNS, generator=generator) < 0.6).float()
    mask[2] = 0
    halves = torch.arange(COLUMNS) * ROW_SEGMENTS // COLUMNS
    ids = torch.arange(last - first)[:, None] * ROW_SEGMENTS + halves
    reference = -torch.rand(ROWS * ROW_SEGMENTS, generator=generator, dtype=torch.float64) * 15
    own = slice(first * ROW_SEGMENTS, last * ROW_SEGMENTS)
    return LossInputs(
        log_probs_BS=log_probs[first:last],
        loss_mask_BS=mask[first:last],
        segment_ids_BS=ids,
        num_segments=(last - first) * ROW_SEGMENTS,
        segment_extras={"reference": reference[own]},
    )


def loss_of(objective, inputs: LossInputs) -> Loss:
    def segment_sum(values_BS: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(inputs.num_segments, dtype=torch.float64)
        return sums.index_add(0, inputs.segment_ids_BS.flatten(), values_BS.flatten().double())

    return objective(inputs, segment_sum)


def differs(objective) -> bool:
    """Whether any split into micro-batches changes a sum."""
    whole = loss_of(objective, rows(0, ROWS))
    for cuts in ((0, 1, ROWS), (0, 2, 3, ROWS), (0, 3, ROWS)):
        parts = [loss_of(objective, rows(*cut)) for cut in pairwise(cuts)]
        pairs = [(whole.loss_sum, sum(part.loss_sum for part in parts))]
        pairs.append((whole.weight_sum, sum(part.weight_sum for part in parts)))
        for name, value in whole.metrics.items():
            for i in (0, 1):
                pairs.append((value[i], sum(part.metrics[name][i] for part in parts)))
        if any(not torch.isclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs):
            return True
    return False


@pytest.mark.parametrize("name", STAGES)
def test_any_split_into_micro_batches_gives_the_same_sums(name: str) -> None:
    recipe = tiny_recipe(f"run.stage={name}")
    objective = stage_of(recipe).make_objective(recipe)
    loss = loss_of(objective, rows(0, ROWS))
    assert tuple(loss.metrics) == objective.metric_names
    assert loss.weight_sum > 0
    assert not differs(objective)


class MeanOfMeans(NextToken):
    """A mean per micro-batch, the mistake that the law forbids."""

    def __call__(self, inputs, segment_sum) -> Loss:
        loss = super().__call__(inputs, segment_sum)
        return Loss(loss.loss_sum / loss.weight_sum.clamp_min(1), torch.ones_like(loss.loss_sum))


def test_mean_of_means_breaks_the_law() -> None:
    assert differs(MeanOfMeans())
