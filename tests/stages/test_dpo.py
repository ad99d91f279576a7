"""The DPO loss against values worked out by hand, pair by pair, in fp64.

The model is a table of logits by the token before, so that log-probabilities are exact and have
gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phi4.config import DpoConfig
from phi4.data.stream.batch import Batch
from phi4.engine.objective import Loss, LossInputs, SegmentSum, make_segment_sum
from phi4.errors import DataError
from phi4.stages import dpo
from phi4.stages.dpo import PreferenceLoss
from tests.support.pair_rows import Pair, Row, mean_chosen_tokens, num_pairs, pair_batch
from tests.support.preference import VOCABULARY, drawn_pair, drawn_trajectory

LENGTH = 80
TOLERANCE = 1e-9
ALONE = SimpleNamespace(size=lambda: 1)
SETTINGS = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1},
    "sigmoid_norm": {"loss": "sigmoid_norm"},
    "ipo": {"loss": "ipo", "beta": 0.3},
    "hinge": {"loss": "hinge"},
    "with sft": {"sft_weight": 0.7},
}


@dataclass
class Found:
    """Of a step: what it minimises, its gradient, its metrics."""

    loss: torch.Tensor
    gradient: torch.Tensor
    metrics: dict[str, float]


def table() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


def inputs_of(batch: Batch, logits_VV: torch.Tensor) -> tuple[LossInputs, SegmentSum]:
    """What the engine would hand over."""
    log_probs_VV = logits_VV.log_softmax(-1)
    ids_BS = torch.from_numpy(batch.segment_ids)
    second_BS = batch.alternative_labels
    alternatives = {}
    if second_BS is not None:
        mask_BS = torch.from_numpy(second_BS >= 0)
        found_BS = log_probs_VV[batch.tokens, np.maximum(second_BS, 0)] * mask_BS
        alternatives = {"alternative_log_probs_BS": found_BS, "alternative_mask_BS": mask_BS}
    inputs = LossInputs(
        log_probs_BS=log_probs_VV[batch.tokens, batch.labels],
        loss_mask_BS=torch.from_numpy(batch.loss_mask),
        segment_ids_BS=ids_BS,
        num_segments=batch.num_segments,
        segment_extras={k: torch.from_numpy(v) for k, v in batch.segment_extras.items()},
        **alternatives,
    )
    return inputs, make_segment_sum(ids_BS, batch.num_segments, ALONE)


def step(ranks: Sequence[Sequence[Batch]], objective: PreferenceLoss) -> Found:
    """Sums of all micro-batches of all data ranks, divided once, as the engine does."""
    logits_VV = table()
    losses = [objective(*inputs_of(batch, logits_VV)) for rank in ranks for batch in rank]
    weight = sum(loss.weight_sum for loss in losses)
    for loss in losses:
        loss.loss_sum.backward()
    metrics = {
        name: float(sum(loss.metrics[name][0] for loss in losses) / weight)
        for name in objective.metric_names
    }
    total = sum(loss.loss_sum.detach() for loss in losses)
    return Found(total / weight, logits_VV.grad / weight, metrics)


def by_hand(pairs: Sequence[Pair], settings: DpoConfig) -> Found:
    """The same of pairs that share nothing, from the definitions."""
    logits_VV = table()
    log_probs_VV = logits_VV.log_softmax(-1)
    losses, sft, rows = [], [], []
    for pair in pairs:
        sides, means = [], []
        for answer, reference in zip((pair.chosen, pair.rejected), pair.reference, strict=True):
            ids = [*pair.prompt[-1:], *answer]
            tokens = log_probs_VV[ids[:-1], ids[1:]]
            sides.append(tokens.sum())
            means.append((tokens.sum() - reference) / len(answer))
            if answer is pair.chosen:
                sft += list(-tokens)
        chosen, rejected = (side - r for side, r in zip(sides, pair.reference, strict=True))
        margin, smoothing = chosen - rejected, settings.label_smoothing
        losses.append(
            {
                "sigmoid": -(1 - smoothing) * F.logsigmoid(settings.beta * margin)
                - smoothing * F.logsigmoid(-settings.beta * margin),
                "sigmoid_norm": -F.logsigmoid(settings.beta * (means[0] - means[1])),
                "ipo": (means[0] - means[1] - 1 / (2 * settings.beta)) ** 2,
                "hinge": (1 - settings.beta * margin).clamp_min(0),
            }[settings.loss]
        )
        rewards = (settings.beta * chosen, settings.beta * rejected, settings.beta * margin)
        rows.append([x.item() for x in (*rewards, margin > 0, *sides, chosen)])
    loss = torch.stack(losses).mean() + settings.sft_weight * torch.stack(sft).mean()
    loss.backward()
    metrics = dict(zip(PreferenceLoss.metric_names, np.mean(rows, axis=0), strict=True))
    return Found(loss.detach(), logits_VV.grad, metrics)


def check(found: Found, exact: Found) -> None:
    torch.testing.assert_close(found.loss, exact.loss, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found.gradient, exact.gradient, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.metrics == pytest.approx(exact.metrics, rel=TOLERANCE, abs=TOLERANCE)


def uneven_pairs(count: int) -> list[Pair]:
    random = np.random.default_rng(5)
    return [drawn_pair(random, *random.integers(1, 12, 3)) for _ in range(count)]


def batches(rows: Sequence[Row], *sizes: int) -> list[Batch]:
    """Rows as micro-batches of so many."""
    ends = np.cumsum(sizes)
    mean = mean_chosen_tokens(rows)
    return [
        pair_batch(rows[end - size : end], LENGTH, mean)
        for end, size in zip(ends, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [("sigmoid", 0.437488, -0.035434), ("hinge", 0.4, -0.1), ("ipo", 1.0, 2.0)],
)
def test_hand_worked_values(loss: str, value: float, gradient: float) -> None:
    """Margin (-1 + 5) - (-3 + 1) = 6, beta 0.1, one token a side."""
    log_probs_BS = torch.tensor([[-1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    ids_BS = torch.tensor([[0, 1]])
    reference = torch.tensor([-5.0, -1.0], dtype=torch.float64)
    extras = {"segment_extras": {"reference": reference}}
    inputs = LossInputs(log_probs_BS, torch.ones(1, 2), ids_BS, 2, **extras)
    found = PreferenceLoss(DpoConfig(loss=loss))(inputs, make_segment_sum(ids_BS, 2, ALONE))
    found.loss_sum.backward()
    assert found.weight_sum.item() == 1
    assert found.loss_sum.item() == pytest.approx(value, abs=5e-7)
    expected = pytest.approx([gradient, -gradient], abs=5e-7)
    assert log_probs_BS.grad.flatten().tolist() == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_packed_pairs_are_worth_what_each_is_alone(name: str) -> None:
    settings = DpoConfig(**SETTINGS[name])
    pairs = uneven_pairs(6)
    rows = [[pairs[0], pairs[1]], [pairs[2]], [], [pairs[3], pairs[4]], [pairs[5]]]
    check(step([batches(rows, 2, 1, 2)], PreferenceLoss(settings)), by_hand(pairs, settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_any_split_of_four_pairs_is_the_same(name: str) -> None:
    settings = DpoConfig(**SETTINGS[name])
    rows, objective = [[pair] for pair in uneven_pairs(4)], PreferenceLoss(settings)
    whole = step([batches(rows, 4)], objective)
    one, three = batches(rows, 1, 3)
    for ranks in ([[one, three]], [batches(rows, 2, 2)], [[one], [three]]):
        check(step(ranks, objective), whole)


@pytest.mark.parametrize("name", SETTINGS)
def test_pivots_in_one_forward_are_pairs_of_one_token(name: str) -> None:
    settings = DpoConfig(**SETTINGS[name])
    random = np.random.default_rng(7)
    rows = [[drawn_trajectory(random, 20, [0, 3, 4, 19])], [drawn_trajectory(random, 9, [2])]]
    pairs = [pair for [trajectory] in rows for pair in trajectory.as_pairs()]
    check(step([batches(rows, 1, 1)], PreferenceLoss(settings)), by_hand(pairs, settings))


def test_pairs_and_pivots_share_a_batch() -> None:
    random, settings = np.random.default_rng(9), DpoConfig(loss="ipo", sft_weight=0.2)
    pair, trajectory = drawn_pair(random, 4, 5, 2), drawn_trajectory(random, 12, [1, 6])
    found = step([batches([[pair, trajectory], [pair]], 2)], PreferenceLoss(settings))
    check(found, by_hand([pair, *trajectory.as_pairs(), pair], settings))


def test_a_batch_without_references_is_refused_before_any_sum() -> None:
    inputs, _ = inputs_of(pair_batch([uneven_pairs(2)], LENGTH), table())
    never = mock.Mock()
    extras = inputs.segment_extras
    for missing, remedy in (("reference", "phi4 dpo cache-ref"), ("tokens_per_pair", "the mean")):
        others = {name: values for name, values in extras.items() if name != missing}
        with pytest.raises(DataError) as refused:
            PreferenceLoss(DpoConfig(sft_weight=1.0))(replace(inputs, segment_extras=others), never)
        line = str(refused.value)
        assert f"2 pairs has no segment_extras['{missing}']" in line
        assert remedy in line and "\n" not in line
    with pytest.raises(DataError, match="3 segments, expected an even number"):
        PreferenceLoss(DpoConfig())(replace(inputs, num_segments=3), never)
    never.assert_not_called()


# Mutants: what must turn the tests above red.


def prompts_in_the_sum(batch: Batch) -> Batch:
    """Tokens before an answer count for it."""
    ids = batch.segment_ids.copy()
    for row in ids:
        for place in reversed(range(len(row) - 1)):
            if row[place] < 0:
                row[place] = row[place + 1]
    return replace(batch, segment_ids=ids, loss_mask=(ids >= 0).astype(np.float32))


def last_tokens_missing(batch: Batch) -> Batch:
    """The <|im_end|> of an answer does not count."""
    ids = batch.segment_ids
    ends = ids != np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return replace(batch, loss_mask=batch.loss_mask * ~ends)


def sides_swapped_in_one_pair(batch: Batch) -> Batch:
    ids = batch.segment_ids
    return replace(batch, segment_ids=np.where(np.isin(ids, (0, 1)), 1 - ids, ids))


class MeanOfMicroBatch(PreferenceLoss):
    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        loss = super().__call__(inputs, segment_sum)
        one = torch.ones_like(loss.weight_sum)
        metrics = {name: (total / count, one) for name, (total, count) in loss.metrics.items()}
        return Loss(loss.loss_sum / loss.weight_sum, one, metrics)


@pytest.mark.parametrize(
    "change", [prompts_in_the_sum, last_tokens_missing, sides_swapped_in_one_pair]
)
def test_a_mutant_of_the_batch_is_found(change) -> None:
    settings, pairs = DpoConfig(), uneven_pairs(4)
    micro_batches = batches([pairs[:2], pairs[2:]], 1, 1)
    check(step([micro_batches], PreferenceLoss(settings)), by_hand(pairs, settings))
    with pytest.raises(AssertionError):
        changed = [change(batch) for batch in micro_batches]
        check(step([changed], PreferenceLoss(settings)), by_hand(pairs, settings))


def test_a_reference_that_is_added_is_found() -> None:
    settings, pairs, extra = DpoConfig(), uneven_pairs(4), dpo._extra
    with mock.patch.object(dpo, "_extra", lambda *args: -extra(*args)):
        found = step([batches([pairs[:2], pairs[2:]], 2)], PreferenceLoss(settings))
    with pytest.raises(AssertionError):
        check(found, by_hand(pairs, settings))


def test_a_mean_per_micro_batch_is_found() -> None:
    rows = [[pair] for pair in uneven_pairs(4)]
    whole = step([batches(rows, 4)], PreferenceLoss(DpoConfig()))
    check(step([batches(rows, 2, 2)], MeanOfMicroBatch(DpoConfig())), whole)
    with pytest.raises(AssertionError):
        check(step([batches(rows, 1, 3)], MeanOfMicroBatch(DpoConfig())), whole)


def test_a_count_of_pairs_leaves_out_dummy_rows() -> None:
    rows: list[Row] = [[], uneven_pairs(2), []]
    [batch] = batches(rows, 3)
    loss = PreferenceLoss(DpoConfig())(*inputs_of(batch, table()))
    assert float(loss.weight_sum) == num_pairs(rows) == 2
