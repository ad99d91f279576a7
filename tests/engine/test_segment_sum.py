"""A sum over a row that context ranks share is the whole row's, and so is its gradient."""

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phi4.data.stream.batch import build_batch
from phi4.engine import objective
from phi4.engine.model.gpt import global_parameters, unshard
from phi4.engine.objective import Loss, SegmentSum
from tests.support.engines import engine_on, tiny_recipe
from tests.support.ranks import RankPool

_CP2 = "parallel.context=2"
LAYOUTS = {
    "cp2": (_CP2,),
    "tp2xcp2+sp": (_CP2, "parallel.tensor=2", "parallel.sequence=true"),
}
LENGTH, VOCABULARY, EOD = 64, 256, 0
RECIPE = (
    "model.num_layers=2",
    f"model.vocab_size={VOCABULARY}",
    f"data.sequence_length={LENGTH}",
    "batch.global_batch_size=2",
    "optim.clip_grad=0.0",
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segment_sums_over_a_split_row_equal_one_process(pool, layout):
    expected = pool.run(run_segments, (), True)[0]
    for found in pool.run(run_segments, LAYOUTS[layout], True):
        if found is not None:
            check_segments(found, expected)


def test_segment_sum_without_its_backward_reduction_is_found(pool):
    expected = pool.run(run_segments, (), True)[0]
    found = pool.run(run_segments, LAYOUTS["cp2"], False)[0]

    with pytest.raises(AssertionError, match="off by"):
        check_segments(found, expected)


def check_segments(found: tuple[float, Tensors], expected: tuple[float, Tensors]) -> None:
    loss_error = abs(found[0] / expected[0] - 1)
    assert loss_error <= 5e-7, f"the loss is off by {loss_error:.2e}"
    assert found[1].keys() == expected[1].keys()
    for name, truth in expected[1].items():
        error = float((found[1][name] - truth).norm() / truth.norm())
        assert error <= 1e-5, f"{name} is off by {error:.2e}"


# What follows runs in the ranks.


class PairwisePreference:
    """Row 0 preferred to row 1 by their log-probabilities: a loss of sums over split rows."""

    metric_names = ("margin",)

    def __call__(
        self, log_probs_BS: torch.Tensor, loss_mask_BS: torch.Tensor, segment_sum: SegmentSum
    ) -> Loss:
        rows = torch.arange(2).unsqueeze(1).expand(log_probs_BS.shape)
        # Sums of hundreds in fp32 would lose what the logistic function looks at.
        counts_2 = segment_sum(loss_mask_BS.double(), rows, 2)
        sums_2 = segment_sum(log_probs_BS.double() * loss_mask_BS, rows, 2)
        margin = (sums_2 / counts_2) @ torch.tensor([3.0, -3.0], dtype=torch.float64)
        one = torch.ones(())
        return Loss(-F.logsigmoid(margin), one, {"margin": (margin, one)})


def run_segments(
    rank: int, world_size: int, layout: tuple[str, ...], reduces_backward: bool
) -> tuple[float, Tensors] | None:
    """Loss and whole gradients of one step of `PairwisePreference`."""
    tokens = np.random.default_rng(5).integers(1, VOCABULARY, (2, LENGTH + 1))
    mask = np.ones((2, LENGTH), dtype=np.float32)
    mask[0, :20] = 0
    mask[1, :33] = 0
    batch = build_batch(tokens[:, :-1], tokens[:, 1:], mask, eod_id=EOD)
    kept = objective._SumOverRanks.backward
    backward = kept if reduces_backward else staticmethod(lambda ctx, grad: (grad, None))
    with (
        engine_on(rank, tiny_recipe(*RECIPE, *layout)) as engine,
        patch.object(objective._SumOverRanks, "backward", backward),
    ):
        if engine is None:
            return None
        result = engine.train_step([batch], PairwisePreference(), learning_rate=0.0)
        return result.loss, {
            name: unshard(parameter.main_grad, parameter, engine.layout).clone()
            for name, parameter in global_parameters(engine.bare_chunks)
        }
