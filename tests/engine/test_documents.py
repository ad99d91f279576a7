"""What one document cannot do to another, and what a sum over a split row must do.

Attention and positions end at document boundaries. So where one document's tokens change and its
loss weight is 0, the other documents' logits and all parameter gradients stay the same to the bit.
Without the document mask the same check must find the difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phi4.data.batch import Batch, build_batch
from phi4.engine import objective
from phi4.engine.engine import Engine
from phi4.engine.model import global_parameters, unshard
from phi4.engine.objective import Loss, SegmentSum
from phi4.stages.pretrain import NextToken
from tests.support.engines import engine_on, tiny_recipe
from tests.support.ranks import RankPool

_TP2, _CP2, _SP = "parallel.tensor=2", "parallel.context=2", "parallel.sequence=true"
LAYOUTS = {
    "one process": (),
    "tp2+sp": (_TP2, _SP),
    "cp2": (_CP2,),
    "tp2xcp2+sp": (_TP2, _CP2, _SP),
}
LENGTH, VOCABULARY, EOD = 64, 256, 0
RECIPE = (
    "model.num_layers=2",
    f"model.vocab_size={VOCABULARY}",
    f"data.sequence_length={LENGTH}",
    "batch.global_batch_size=2",
    "optim.clip_grad=0.0",
)
# Context ranks meet at columns 16, 32 and 48 of a row.
DOCUMENTS = {
    "first": slice(0, 10),
    "across a context border": slice(10, 37),
    "middle": slice(37, 46),
    "last": slice(46, 64),
}
"""Columns of the first row; the second row has documents of its own."""
SECOND_ROW_ENDS = (5, 29, 30, 63)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """What changed elsewhere when one document's tokens did."""

    own_logits: bool
    """The changed document's, which must."""
    other_logits: bool
    gradients: frozenset[str]
    """Parameters whose gradient is not the same to the bit."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def differences(pool):
    """(layout, recompute, document mask) -> what each rank saw, by document."""

    @cache
    def measure(layout: str, recompute: str, mask: bool) -> list[dict[str, Difference]]:
        overrides = (*LAYOUTS[layout], f"recompute.granularity={recompute}")
        seen = pool.run(run_documents, overrides, mask)
        return [by_document for by_document in seen if by_document is not None]

    return measure


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_changes_nothing_outside_itself(differences, document, layout, recompute):
    for by_document in differences(layout, recompute, True):
        assert by_document[document] == Difference(True, False, frozenset())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "last"])
def test_without_the_document_mask_the_check_finds_the_leak(differences, document, layout):
    for by_document in differences(layout, "none", False):
        assert by_document[document].other_logits
        assert by_document[document].gradients


@pytest.mark.parametrize("layout", ["cp2", "tp2xcp2+sp"])
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


def run_documents(
    rank: int, world_size: int, overrides: tuple[str, ...], mask: bool
) -> dict[str, Difference] | None:
    """What this rank sees change, by changed document."""
    found = {}
    with engine_on(rank, tiny_recipe(*RECIPE, *overrides)) as engine:
        if engine is None:
            return None
        for name, columns in DOCUMENTS.items():
            before, after = (_measure(engine, _batch(columns, seed, mask)) for seed in (1, 2))
            others = torch.ones(2, LENGTH, dtype=torch.bool)
            others[0, columns] = False
            found[name] = Difference(
                own_logits=not _same(before[0][~others], after[0][~others]),
                other_logits=not _same(before[0][others], after[0][others]),
                gradients=frozenset(n for n in before[1] if not _same(before[1][n], after[1][n])),
            )
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _measure(engine: Engine, batch: Batch) -> tuple[torch.Tensor, Tensors]:
    """Logits, and this rank's gradients of the mean loss."""
    logits = engine.logits([batch])[0]
    engine.train_step([batch], NextToken(), learning_rate=0.0)
    return logits, {n: p.main_grad.clone() for n, p in global_parameters(engine.bare_chunks)}


def _batch(changed: slice, seed: int, mask: bool) -> Batch:
    """Two rows of documents; the changed one's tokens depend on the seed and do not count."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (2, LENGTH + 1))
    tokens[0, changed] = np.random.default_rng(seed).integers(1, VOCABULARY, LENGTH)[changed]
    tokens[0, [columns.stop - 1 for columns in DOCUMENTS.values()]] = EOD
    tokens[1, SECOND_ROW_ENDS] = EOD
    weights = (tokens[:, :-1] != EOD).astype(np.float32)
    weights[0, changed] = 0
    return build_batch(tokens[:, :-1], tokens[:, 1:], weights, eod_id=EOD, document_mask=mask)
