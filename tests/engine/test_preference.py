"""A preference over packed pairs trains alike in every layout, and each pair counts once.

It is the loss of run.stage=dpo plus a weighted sum of tokens, so it mixes what could go wrong
apart: sums of segments that context ranks share, a reference per segment, and two labels at one
position.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from phi4.data.stream.batch import Batch
from phi4.engine import engine as engine_module
from phi4.engine import objective
from phi4.engine.engine import Engine
from phi4.engine.model.micro_batch import MicroBatch
from phi4.engine.objective import Loss, LossInputs, SegmentSum
from phi4.engine.step_values import StepResult
from phi4.errors import ConfigError
from phi4.stages.pretrain import NextToken
from phi4.verify.parity import LEARNING_RATE, LOSS_TOLERANCE, PARAMETER_TOLERANCE
from tests.support.engines import engine_on, tiny_recipe
from tests.support.preference import NUM_MICRO_BATCHES, NUM_ROWS, Preference, num_pairs, pairs
from tests.support.ranks import RankPool, pool_fixture

STEPS = 2
RECIPE = (
    "model.num_layers=2",
    f"batch.global_batch_size={NUM_MICRO_BATCHES * NUM_ROWS}",
    "loss_head.chunk_tokens=12",
)
TP2, SP = "parallel.tensor=2", "parallel.sequence=true"
PP2, CP2, DP2 = "parallel.pipeline=2", "parallel.context=2", "parallel.data=2"
RING, CHUNKED = "parallel.context_attention=ring", "loss_head.form=recompute"
SPLIT = (TP2, SP, CP2, RING, CHUNKED)
VPP2 = ("parallel.virtual_pipeline=2", "parallel.overlap_p2p=true", "model.num_layers=4")
LAYOUTS = {
    "tp2xcp2+sp, ring, recompute": SPLIT,
    "pp2xdp2": (PP2, DP2),
}
"""Every kind of split."""
REST = {
    "one process, recompute": (CHUNKED,),
    "tp2": (TP2,),
    "tp2, recompute": (TP2, CHUNKED),
    "tp2+sp": (TP2, SP),
    "pp2, full recompute": (PP2, "recompute.granularity=full"),
    "pp2-vpp2": (PP2, *VPP2),
    "cp2": (CP2,),
    "cp2, ring": (CP2, RING),
    "dp2": (DP2,),
    "dp2, recompute": (DP2, CHUNKED),
    "tp2xpp2+sp": (TP2, PP2, SP),
    "pp2xcp2, ring": (PP2, CP2, RING),
}


pool = pool_fixture(4)


@pytest.fixture(scope="module")
def truth(pool: RankPool) -> Callable[..., dict]:
    """What one process finds, by the recipe and the loss."""
    known: dict[tuple, dict] = {}

    def of(layout: tuple[str, ...], **terms: str | float) -> dict:
        model = tuple(key for key in layout if key.startswith("model."))
        case = (model, *terms.items())
        if case not in known:
            known[case] = pool.run(train, model, terms)[0]
        return known[case]

    return of


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
)
def test_a_preference_trains_alike_in_every_layout(layout, pool, truth):
    overrides = (LAYOUTS | REST)[layout]
    for found in pool.run(train, overrides, {}):
        if found is not None:
            check(found, truth(overrides))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "hinge"])
@pytest.mark.parametrize("layout", [SPLIT, (PP2, DP2)], ids=LAYOUTS)
def test_each_loss_alone_trains_alike(layout, loss, pool, truth):
    alone = {"loss": loss, "sft_weight": 0.0, "share": 0.0}
    for found in pool.run(train, layout, alone):
        if found is not None:
            check(found, truth(layout, **alone))


@pytest.mark.parametrize("form", ["logits", "recompute"])
def test_second_labels_have_the_gradient_of_a_pass_of_their_own(form, pool):
    one, two = pool.run(run_pivots, form)[0]
    assert one.loss == pytest.approx(two.loss, rel=LOSS_TOLERANCE)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=LOSS_TOLERANCE)
    assert one.weight == two.weight > 0


def check(found: dict, exact: dict) -> None:
    assert found["weights"] == [num_pairs()] * STEPS, f"{found['weights']} pairs count"
    names = ("losses", "grad_norms", "margins")
    for name, allowed in zip(names, (LOSS_TOLERANCE, PARAMETER_TOLERANCE, 1e-5), strict=True):
        errors = np.abs(np.divide(found[name], exact[name]) - 1)
        assert errors.max() <= allowed, f"{name} are off by {errors}"
    for name, tensor in found["tensors"].items():
        error = float((tensor - exact["tensors"][name]).norm() / exact["tensors"][name].norm())
        assert error <= PARAMETER_TOLERANCE, f"{name} is off by {error:.1e}"


def first_columns(whole: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(whole[:, : like.shape[1]])).to(like.dtype)


def segments_not_cut(batch: Batch, placed: MicroBatch) -> MicroBatch:
    if batch.segment_ids is None:
        return placed
    return replace(placed, segment_ids_BS=first_columns(batch.segment_ids, placed.segment_ids_BS))


def extras_not_cut(batch: Batch, placed: MicroBatch) -> MicroBatch:
    extras = {"share": first_columns(batch.token_extras["share"], placed.loss_mask_BS)}
    return replace(placed, token_extras=extras)


def none_is_the_first(batch: Batch, placed: MicroBatch) -> MicroBatch:
    if batch.segment_ids is None:
        return placed
    return replace(placed, segment_ids_BS=placed.segment_ids_BS.clamp_min(0))


def alternatives_one_late(batch: Batch, placed: MicroBatch) -> MicroBatch:
    rows = placed.alternatives
    if rows is None:
        return placed
    places_N = (rows.places_N + NUM_ROWS).clamp_max(placed.labels_BS.numel() - 1).unique()
    found = replace(rows, places_N=places_N, slots_N=rows.slots_N[: len(places_N)])
    return replace(placed, alternatives=found)


def alternatives_of_the_neighbour(batch: Batch, placed: MicroBatch) -> MicroBatch:
    """Tensor ranks append each other's rows."""
    rows = placed.alternatives
    return (
        placed
        if rows is None
        else replace(placed, alternatives=replace(rows, appended_A=rows.appended_A.flip(0)))
    )


PLACED_WRONGLY = {
    f.__name__: f
    for f in (
        segments_not_cut,
        extras_not_cut,
        none_is_the_first,
        alternatives_one_late,
        alternatives_of_the_neighbour,
    )
}
MUTANTS = (
    *PLACED_WRONGLY,
    "every context rank counts",
    "only its own part of a segment",
    "no reduction in backward",
)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found(mutant, pool, truth):
    with pytest.raises(AssertionError, match=r"off by|pairs count"):
        check(pool.run(train, SPLIT, {}, mutant)[0], truth(SPLIT))


def test_one_pass_is_refused_before_the_first_step(pool):
    for objective_name in ("preference", "pivots of next tokens"):
        for text, changed in pool.run(refused_by_one_pass, objective_name)[:2]:
            assert text.startswith("loss_head.form=one_pass computes") and "\n" not in text
            assert not changed


# What follows runs in the ranks.


class Gaps:
    """Pivots over their alternatives, these in the same pass or in one of their own, negated."""

    metric_names = ()
    gradient = "any"

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        loss = inputs.token_total(inputs.log_probs_BS * inputs.loss_mask_BS)
        weight = inputs.token_total(inputs.loss_mask_BS.clamp_min(0))
        if inputs.alternative_mask_BS is not None:
            loss = loss - inputs.token_total(inputs.alternative_log_probs_BS)
        return Loss(loss, weight)


def run_pivots(rank: int, world_size: int, form: str) -> tuple[StepResult, StepResult] | None:
    """A step with second labels, and one with them as labels of a micro-batch of their own."""
    with engine_on(rank, tiny_recipe(*RECIPE, f"loss_head.form={form}")) as engine:
        if engine is None:
            return None
        batch = pairs(0, 3)
        second = batch.alternative_labels
        pivots = (second >= 0).astype(np.float32)
        first = replace(batch, loss_mask=pivots)
        alone = replace(first, alternative_labels=None)
        other = replace(alone, labels=np.maximum(second, 0), loss_mask=-pivots)
        return tuple(
            engine.train_step(batches, Gaps(), learning_rate=0.0)
            for batches in ([first], [alone, other])
        )


class ShareOfNextTokens(NextToken):
    """Declares what one pass serves; a batch's second labels are refused all the same."""


def train(
    rank: int, world_size: int, layout: tuple[str, ...], terms: dict, mutant: str = ""
) -> dict | None:
    """Results of steps, and parameters after the last."""
    with engine_on(rank, tiny_recipe(*RECIPE, *layout)) as engine, mutated(mutant):
        if engine is None:
            return None
        results = [
            engine.train_step(own(engine, step), Preference(**terms), learning_rate=LEARNING_RATE)
            for step in range(STEPS)
        ]
        return {
            "losses": [result.loss for result in results],
            "grad_norms": [result.grad_norm for result in results],
            "weights": [result.weight for result in results],
            "margins": [result.metrics["rewards/margins"] for result in results],
            "tensors": {name: tensor.clone() for name, tensor in engine.whole_parameters()},
        }


def own(engine: Engine, step: int) -> list[Batch]:
    """This data rank's micro-batches."""
    layout = engine.layout
    return [pairs(step, i) for i in range(layout.dp_rank, NUM_MICRO_BATCHES, layout.dp_size)]


def mutated(name: str):
    if name == "every context rank counts":
        return mock.patch.object(LossInputs, "segment_total", lambda _, values_P: values_P.sum())
    if name == "only its own part of a segment":
        forward = staticmethod(lambda ctx, x, group: setattr(ctx, "group", group) or x.clone())
        return mock.patch.object(objective._SumOverRanks, "forward", forward)
    if name == "no reduction in backward":
        backward = staticmethod(lambda ctx, grad: (grad, None))
        return mock.patch.object(objective._SumOverRanks, "backward", backward)
    kept = engine_module.to_device
    change = PLACED_WRONGLY.get(name, lambda batch, placed: placed)
    return mock.patch.object(
        engine_module, "to_device", lambda batch, **options: change(batch, kept(batch, **options))
    )


def refused_by_one_pass(rank: int, world_size: int, objective_name: str) -> tuple[str, bool] | None:
    """What a step says on two ranks, and whether it changed a parameter or reached the schedule."""
    recipe = tiny_recipe(*RECIPE, TP2, "loss_head.form=one_pass")
    with engine_on(rank, recipe) as engine:
        if engine is None:
            return None
        before = [parameter.clone() for parameter in engine.bare_chunks[0].parameters()]
        loss = Preference() if objective_name == "preference" else ShareOfNextTokens()
        with mock.patch.object(engine_module.steps, "run_schedule") as schedule:
            try:
                engine.train_step(own(engine, 0), loss, learning_rate=LEARNING_RATE)
            except ConfigError as error:
                after = engine.bare_chunks[0].parameters()
                same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                return str(error), schedule.called or not same
        return "", True
