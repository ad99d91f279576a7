"""RMSNorm beyond numerics: sums over a sequence-parallel group, and what is saved."""

import pytest
import torch
import torch.distributed as dist
from phi4_kernels.rms_norm import add_rms_norm, rms_norm
from phi4_kernels.swiglu import swiglu, swiglu_linear

from tests.support.ranks import gloo_group, run_ranks

ROWS, HIDDEN = 6, 32


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, dy = (torch.randn(ROWS, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    return x, dy, torch.randn(HIDDEN, generator=generator).bfloat16()


def split_rows_gradient(rank: int, world_size: int) -> None:
    x, dy, weight = inputs()
    halves = [slice(part * ROWS // world_size, (part + 1) * ROWS // world_size) for part in (0, 1)]
    mine = halves[rank]
    weight.requires_grad_()
    with gloo_group(rank, world_size):
        rms_norm(x[mine], weight, 1e-5, grad_group=dist.group.WORLD).backward(dy[mine])
    partial = []
    for half in halves:
        wide = weight.detach().float().requires_grad_()
        rms_norm(x[half], wide, 1e-5).backward(dy[half])
        partial.append(wide.grad)
    # Summed in fp32 and rounded once; rounding each part first would give other bits.
    assert torch.equal(weight.grad, sum(partial).bfloat16())
    assert not torch.equal(weight.grad, sum(part.bfloat16() for part in partial))


def test_weight_gradient_is_summed_over_the_sequence_parallel_group() -> None:
    run_ranks(2, split_rows_gradient)


def test_the_sum_is_the_next_residual() -> None:
    x, residual, weight = inputs()
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("shape", [(HIDDEN,), (2, 3, HIDDEN)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    assert rms_norm(torch.randn(shape), torch.ones(HIDDEN), 1e-5).shape == shape
    assert swiglu(torch.randn(shape)).shape == (*shape[:-1], HIDDEN // 2)


def test_swiglu_linear_saves_nothing_as_wide_as_the_product() -> None:
    gate_up = torch.randn(5, 2 * 48, requires_grad=True)
    down = torch.randn(8, 48, requires_grad=True)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        swiglu_linear(gate_up, down)
    assert sorted(saved) == [(5, 96), (8, 48)]
