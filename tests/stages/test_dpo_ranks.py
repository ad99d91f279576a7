"""DPO on the engine: splits over micro-batches and ranks, pivots in one forward, tensor ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from phi4.config import DpoConfig
from phi4.data.stream.batch import Batch
from phi4.engine.objective import LossInputs, make_segment_sum
from phi4.stages.dpo import PreferenceLoss
from phi4.verify.parity import LOSS_TOLERANCE, PARAMETER_TOLERANCE
from tests.support.engines import engine_on, tiny_recipe
from tests.support.pair_rows import Pair, Row, mean_chosen_tokens, pair_batch
from tests.support.preference import LENGTH, VOCABULARY, drawn_pair, drawn_trajectory
from tests.support.ranks import RankPool, pool_fixture

SETTINGS = DpoConfig(loss="ipo", sft_weight=0.3)
"""What depends on the most: lengths of both sides, and tokens of the global batch."""
RECIPE = ("model.num_layers=2", "optim.clip_grad=0", "loss_head.form=logits")
EXACT = 1e-6
"""Of one forward against two."""


@dataclass
class Found:
    """What a step without learning leaves behind."""

    loss: float
    num_pairs: float
    gradients: dict[str, torch.Tensor]


pool = pool_fixture(3)


def drawn_rows(count: int) -> list[Row]:
    random = np.random.default_rng(11)
    return [[drawn_pair(random, *random.integers(1, 10, 3))] for _ in range(count)]


def batches(rows: Sequence[Row], *sizes: int) -> list[Batch]:
    """Rows as micro-batches with so many pairs, filled up with dummy rows to one shape."""
    mean, ends = mean_chosen_tokens(rows), np.cumsum(sizes)
    parts = [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [pair_batch([*part, *[[]] * (max(sizes) - len(part))], LENGTH, mean) for part in parts]


def check(found: Found, exact: Found, loss_error: float, gradient_error: float) -> None:
    assert found.num_pairs == exact.num_pairs
    assert found.loss == pytest.approx(exact.loss, rel=loss_error)
    for name, gradient in exact.gradients.items():
        error = float((found.gradients[name] - gradient).norm() / gradient.norm())
        assert error <= gradient_error, f"{name} is off by {error:.1e}"


def test_any_split_of_four_pairs_is_the_same(pool: RankPool) -> None:
    rows = drawn_rows(4)
    whole = pool.run(gradients, 1, [batches(rows, 4)])[0]
    assert whole.num_pairs == 4
    one, three = batches(rows, 1, 3)
    for size, ranks in ((1, [[one, three]]), (1, [batches(rows, 2, 2)]), (2, [[one], [three]])):
        found = pool.run(gradients, size, ranks)[0]
        check(found, whole, LOSS_TOLERANCE, PARAMETER_TOLERANCE)


def test_ten_pairs_on_three_data_ranks_count_once(pool: RankPool) -> None:
    rows = drawn_rows(10)
    filled = batches(rows, 2, 2, 2, 2, 2, 0)
    found = pool.run(gradients, 3, [filled[rank::3] for rank in range(3)])[0]
    assert found.num_pairs == 10
    whole = pool.run(gradients, 1, [batches(rows, 10)])[0]
    check(found, whole, LOSS_TOLERANCE, PARAMETER_TOLERANCE)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_pivots_in_one_forward_are_pairs_of_two_sequences(pool: RankPool, loss: str) -> None:
    random, settings = np.random.default_rng(13), DpoConfig(loss=loss)
    trajectory = drawn_trajectory(random, 14, [0, 3, 8, 13])
    one = [pair_batch([[trajectory]], LENGTH)]
    two = batches([[pair] for pair in trajectory.as_pairs()], 4)
    exact = pool.run(gradients, 1, [two], settings)[0]
    assert exact.num_pairs == 4
    check(pool.run(gradients, 1, [one], settings)[0], exact, EXACT, EXACT)


def test_a_tensor_rank_without_labels_has_the_gradient_of_the_softmax(pool: RankPool) -> None:
    random, half = np.random.default_rng(17), VOCABULARY // 2
    prompt, chosen, rejected = (random.integers(half, VOCABULARY, size) for size in (4, 5, 3))
    batch = pair_batch([[Pair(prompt, chosen, rejected, (-20.0, -15.0))]], LENGTH)
    first, second = pool.run(head_gradients, batch)[:2]
    softmax_SBV = torch.cat((first["logits"], second["logits"]), dim=-1).double().softmax(-1)
    outer_SB1 = first["outer"].t().unsqueeze(-1).double()
    assert int(outer_SB1.count_nonzero()) == len(chosen) + len(rejected)
    expected_SBV = -softmax_SBV[..., :half] * outer_SB1
    torch.testing.assert_close(first["logit_gradients"].double(), expected_SBV, rtol=1e-5, atol=0)
    assert torch.equal(first["hidden_gradients"], second["hidden_gradients"])
    assert bool(first["hidden_gradients"].any())


# What follows runs in the ranks.


def gradients(
    rank: int,
    world_size: int,
    data_size: int,
    ranks: list[list[Batch]],
    settings: DpoConfig = SETTINGS,
) -> Found | None:
    """Of a step over the micro-batches of each data rank."""
    num_rows = len(ranks[0][0].tokens)
    sizes = f"batch.global_batch_size={num_rows * data_size}", f"batch.micro_batch_size={num_rows}"
    recipe = tiny_recipe(*RECIPE, *sizes, f"parallel.data={data_size}")
    with engine_on(rank, recipe) as engine:
        if engine is None:
            return None
        result = engine.train_step(ranks[rank], PreferenceLoss(settings), learning_rate=0.0)
        named = engine.bare_chunks[0].named_parameters()
        found = {name: parameter.main_grad.clone() for name, parameter in named}
        return Found(result.loss, result.weight, found)


def head_gradients(rank: int, world_size: int, batch: Batch) -> dict[str, torch.Tensor] | None:
    """Logits and gradients of the loss head on two tensor ranks."""
    with engine_on(rank, tiny_recipe(*RECIPE, "parallel.tensor=2")) as engine:
        if engine is None:
            return None
        shape = (*batch.tokens.T.shape, engine.recipe.model.hidden_size)
        hidden_SBH = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        hidden_SBH.requires_grad_()
        labels_BS, mask_BS = torch.from_numpy(batch.labels), torch.from_numpy(batch.loss_mask)
        head, found = engine.bare_chunks[0].output_layer, {}
        logits_of = ColumnParallelLinear.forward

        def watched(*args: object, **options: object) -> tuple[torch.Tensor, None]:
            logits_SBV, bias = logits_of(*args, **options)
            found["logits"] = logits_SBV.detach().clone()
            logits_SBV.register_hook(lambda grad: found.update(logit_gradients=grad.clone()))
            return logits_SBV, bias

        with engine.patches, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ColumnParallelLinear, "forward", watched)
            log_probs_BS, _ = head(hidden_SBH, labels=labels_BS, loss_mask=mask_BS)
            log_probs_BS.retain_grad()
            ids_BS = torch.from_numpy(batch.segment_ids)
            extras = {name: torch.from_numpy(x) for name, x in batch.segment_extras.items()}
            inputs = LossInputs(log_probs_BS, mask_BS, ids_BS, 2, segment_extras=extras)
            segment_sum = make_segment_sum(ids_BS, 2, engine.layout.groups.cp)
            PreferenceLoss(SETTINGS)(inputs, segment_sum).loss_sum.backward()
        return {**found, "outer": log_probs_BS.grad, "hidden_gradients": hidden_SBH.grad}
