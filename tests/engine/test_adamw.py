"""Our AdamW is torch's, with the step in the group."""

import pytest
import torch

from phi4.engine.adamw import AdamW


def test_updates_equal_torch_over_many_steps() -> None:
    random = torch.Generator().manual_seed(3)
    start = [torch.randn(7, 5, generator=random), torch.randn(11, generator=random)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = AdamW(ours, **settings)
    reference = torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(50):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert mine.param_groups[0]["step"] == 50
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_group_without_gradients_keeps_its_step() -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.ones(2))])
    optimizer.step()
    assert "step" not in optimizer.param_groups[0]


def test_l2_regularisation_is_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode=False"):
        AdamW([torch.nn.Parameter(torch.ones(2))], adam_w_mode=False)
