"""Chunks of logits, in every kind of layout, train like all logits on one process.

All logits in every layout are what the tests of parity run.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from phi4.config import LossHeadConfig
from phi4.engine.model.loss_head import LossHead
from phi4.engine.model.weight_gradients import AddsItsOwnGradient
from phi4.engine.objective import Loss
from phi4.errors import ConfigError
from phi4.stages.pretrain import NextToken
from phi4.verify.parity import LEARNING_RATE, LOSS_TOLERANCE, PARAMETER_TOLERANCE
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

FORMS = ("logits", "recompute", "one_pass")
STEPS = 2
RECIPE = (
    "model.num_layers=2",
    "data.sequence_length=16",
    "data.unit_tokens=16",
    "batch.global_batch_size=4",
    "loss_head.chunk_tokens=12",
)
OVERLAPPED = (
    "parallel.data=2",
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)
LAYOUTS = {
    "one process, full recompute": ("recompute.granularity=full",),
    "tp2": ("parallel.tensor=2",),
    "tp2+sp": ("parallel.tensor=2", "parallel.sequence=true"),
    "cp2": ("parallel.context=2",),
    "pp2": ("parallel.pipeline=2",),
    "dp2, everything overlapped": OVERLAPPED,
}


class Squares:
    """Not linear in the log-probabilities, as DPO's loss is not."""

    metric_names = ()
    gradient = "any"

    def __call__(self, inputs, segment_sum):
        squares_BS = inputs.log_probs_BS.square() * inputs.loss_mask_BS
        return Loss(inputs.token_total(squares_BS), inputs.token_total(inputs.loss_mask_BS))


class UndeclaredSquares(Squares):
    """Says that it is what one pass serves."""

    gradient = "masked_nll"


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def truth(pool: RankPool) -> dict:
    """One process that keeps all logits, by objective."""
    return {
        objective: pool.run(train, (), "logits", objective)[0] for objective in (NextToken, Squares)
    }


def train(rank: int, world_size: int, layout: tuple, form: str, objective: type) -> dict | None:
    """Losses of steps and of an evaluation, parameters after the last step."""
    recipe = tiny_recipe(*RECIPE, *layout, f"loss_head.form={form}")
    with engine_on(rank, recipe) as engine:
        if engine is None:
            return None
        steps = [
            engine.train_step(batches_of(engine, step), objective(), learning_rate=LEARNING_RATE)
            for step in range(STEPS)
        ]
        evaluated = engine.evaluate(batches_of(engine, STEPS), NextToken())
        tensors = {name: tensor.clone() for name, tensor in engine.whole_parameters()}
        losses = [result.loss for result in (*steps, evaluated)]
        return {"losses": losses, "grad_norm": steps[0].grad_norm, "tensors": tensors}


def expect_equal(found: dict, truth: dict) -> None:
    for ours, exact in zip(found["losses"], truth["losses"], strict=True):
        assert abs(ours / exact - 1) <= LOSS_TOLERANCE
    assert abs(found["grad_norm"] / truth["grad_norm"] - 1) <= LOSS_TOLERANCE
    for name, tensor in found["tensors"].items():
        exact = truth["tensors"][name]
        assert (tensor - exact).norm() <= PARAMETER_TOLERANCE * exact.norm(), name


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_in_every_layout_train_alike(
    layout: str, form: str, pool: RankPool, truth: dict
) -> None:
    for found in pool.run(train, LAYOUTS[layout], form, NextToken):
        if found is not None:
            expect_equal(found, truth[NextToken])


def test_another_objective_is_right_with_recompute(pool: RankPool, truth: dict) -> None:
    for found in pool.run(train, LAYOUTS["tp2+sp"], "recompute", Squares):
        expect_equal(found, truth[Squares])


def refused(rank: int, world_size: int, objective: type) -> str:
    with engine_on(rank, tiny_recipe(*RECIPE, "loss_head.form=one_pass")) as engine:
        if engine is not None:
            try:
                engine.train_step(batches_of(engine, 0), objective(), learning_rate=LEARNING_RATE)
            except ConfigError as error:
                return str(error)
    return ""


def test_a_wrongly_declared_objective_is_found_in_one_pass(pool: RankPool) -> None:
    text = pool.run(refused, UndeclaredSquares)[0]
    assert text.startswith("loss_head.form=one_pass requires") and "\n" not in text


def added_twice(rank: int, world_size: int) -> dict | None:
    """A head whose gradient megatron-core's hook adds again."""

    def forgetful(ctx, _: None) -> None:
        ctx.weight.grad = torch.ones_like(ctx.weight)

    with mock.patch.object(AddsItsOwnGradient, "backward", staticmethod(forgetful)):
        return train(rank, world_size, (), "one_pass", NextToken)


def test_a_gradient_that_is_added_twice_is_found(pool: RankPool, truth: dict) -> None:
    with pytest.raises(AssertionError):
        expect_equal(pool.run(added_twice)[0], truth[NextToken])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_without_a_buffer_gets_its_gradient_from_autograd(form: str, tied: bool) -> None:
    hidden, own = torch.randn(5, 2, 8).requires_grad_(), torch.nn.Parameter(torch.randn(24, 8))
    labels, mask = torch.randint(24, (2, 5)), torch.rand(2, 5)
    head = plain_head(own, LossHeadConfig(form=form, chunk_tokens=3))
    if tied:
        own.main_grad = torch.zeros(24, 8)
    log_probs, _ = head(hidden, own if tied else None, labels=labels, loss_mask=mask)
    (-(log_probs * mask).sum()).backward()
    found = [hidden.grad, own.grad]
    hidden.grad = own.grad = None
    expected = -F.cross_entropy((hidden @ own.t()).permute(1, 2, 0), labels, reduction="none")
    torch.testing.assert_close(log_probs, expected)
    (-(expected * mask).sum()).backward()
    for ours, exact in zip(found, (hidden.grad, own.grad), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    assert not tied or not own.main_grad.any()


def plain_head(weight: torch.nn.Parameter, settings: LossHeadConfig) -> LossHead:
    """A head without megatron-core's process state."""
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    head = LossHead.__new__(LossHead)
    torch.nn.Module.__init__(head)
    head.weight, head.tp_group, head.sequence_parallel = weight, alone, False
    head.settings = settings
    return head


@pytest.fixture(autouse=True)
def plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's layer in this process, which has no ranks, is a product."""
    monkeypatch.setattr(
        ColumnParallelLinear,
        "forward",
        lambda self, x, weight=None, _=None: (
            x @ (self.weight if weight is None else weight).t(),
            None,
        ),
    )
