"""Log-probabilities over a split vocabulary equal log_softmax, gradients included."""

import pytest
import torch

from phi4.engine.loss_head import vocab_parallel_log_probs
from tests.support.ranks import RankPool, gloo_group


def _split(rank: int, world_size: int, logits, labels, upstream):
    with gloo_group(rank, world_size):
        leaf = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
        log_probs = vocab_parallel_log_probs(leaf * 1, labels, torch.distributed.group.WORLD)
        log_probs.backward(upstream)
        return log_probs.detach(), leaf.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_log_probs_equal_log_softmax(
    world_size: int, scale: float, dtype: torch.dtype, pools: dict[int, RankPool]
) -> None:
    random = torch.Generator().manual_seed(7)
    logits = (torch.randn(5, 3, 64, generator=random) * scale).to(dtype)
    labels = torch.randint(0, 64, (3, 5), generator=random)
    upstream = torch.randn(3, 5, generator=random)
    truth = logits.double().requires_grad_()
    expected = truth.log_softmax(-1).gather(-1, labels.t().unsqueeze(-1)).squeeze(-1).t()
    expected.backward(upstream.double())
    results = pools[world_size].run(_split, logits, labels, upstream)
    gradient = torch.cat([grad for _, grad in results], dim=-1)
    eps = torch.finfo(torch.float32).eps
    for log_probs, _ in results:
        assert log_probs.dtype is torch.float32
        torch.testing.assert_close(
            log_probs.double(), expected.detach(), rtol=8 * eps, atol=8 * eps * max(1, scale)
        )
    unit = torch.finfo(dtype).eps
    assert (gradient.double() - truth.grad).abs().max() <= 2 * unit * upstream.abs().max()


def test_empty_micro_batch_has_no_log_probs(pools: dict[int, RankPool]) -> None:
    results = pools[2].run(
        _split, torch.zeros(0, 3, 8), torch.zeros((3, 0), dtype=torch.long), torch.zeros(3, 0)
    )
    assert all(log_probs.shape == (3, 0) for log_probs, _ in results)


@pytest.fixture(scope="module")
def pools():
    """Ranks by world size."""
    with RankPool(1) as one, RankPool(2) as two, RankPool(4) as four:
        yield {1: one, 2: two, 4: four}
