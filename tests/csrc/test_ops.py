"""The public ops: torch and cuda give the same, and bad input is named."""

import math
from pathlib import Path

import pytest
import torch
from phi4_kernels.adamw import Hyper, Shard, adamw
from phi4_kernels.errors import DtypeError, KernelError, ShapeError
from phi4_kernels.fp8_cast import cast_blocks, cast_tensor
from phi4_kernels.grad_norm import clip_factor, square_sum

from tests.csrc.host_checks import same_bytes

HYPER = Hyper(lr=1e-2, weight_decay=0.1)


def _shard(size: int) -> Shard:
    param = torch.randn(size, generator=torch.Generator().manual_seed(2))
    return Shard(param, torch.zeros(size), torch.zeros(size))


@pytest.mark.parametrize("size", [0, 1, 1001])
def test_adamw_equals_torch_optim(size: int) -> None:
    shard = _shard(size)
    anchor = torch.nn.Parameter(shard.param.clone())
    optimizer = torch.optim.AdamW([anchor], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        grad = torch.sin(torch.arange(size) * step * 1.0)
        anchor.grad = grad * 0.5
        optimizer.step()
        adamw(shard, grad, step, HYPER, grad_scale=torch.tensor(0.5))
    torch.testing.assert_close(shard.param, anchor.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("size", [0, 1, 1001])
def test_adamw_reads_what_changes_from_tensors(loaded: Path, size: int) -> None:
    ours, ours_device, plain = _shard(size), _shard(size), _shard(size)
    grad = torch.cos(torch.arange(size) * 1.0)
    device = Hyper(lr=torch.tensor(1e-2, dtype=torch.float64), weight_decay=0.1)
    weights = [torch.empty(size, dtype=torch.bfloat16) for _ in range(2)]
    for step in range(1, 4):
        adamw(ours, grad, step, HYPER, weight=weights[0], implementation="cuda")
        adamw(ours_device, grad, torch.tensor(step), device, implementation="cuda")
        adamw(plain, grad, step, HYPER, weight=weights[1], implementation="torch")
    assert all(torch.equal(a, b) for a, b in zip(ours, ours_device, strict=True))
    torch.testing.assert_close(ours.param, plain.param, rtol=2e-6, atol=2e-7)
    assert torch.equal(weights[0], ours.param.bfloat16())
    assert torch.equal(weights[1], plain.param.bfloat16())


def test_clipping_is_what_torch_clips() -> None:
    grads = [torch.randn(30), torch.randn(4, 5), torch.empty(0)]
    parameters = [torch.nn.Parameter(g.clone()) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    factor = clip_factor(square_sum(grads), 1.0)
    torch.testing.assert_close(parameters[0].grad, grads[0] * factor, rtol=1e-5, atol=1e-6)
    assert clip_factor(torch.tensor(0.25, dtype=torch.float64), 1.0) == 1.0
    assert math.isnan(clip_factor(torch.tensor(math.nan, dtype=torch.float64), 1.0))


def test_norm_is_the_same_from_both(loaded: Path) -> None:
    grads = [torch.randn(1000).bfloat16(), torch.randn(7).bfloat16()]
    ours, plain = (square_sum(grads, implementation=name) for name in ("cuda", "torch"))
    assert math.isclose(ours, plain, rel_tol=1e-13)


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_are_the_same_from_both(loaded: Path, dtype: torch.dtype, columnwise: bool) -> None:
    x = torch.randn(200, 140, generator=torch.Generator().manual_seed(3))
    calls = [lambda name: cast_tensor(x, torch.tensor(90.0), dtype=dtype, columnwise=columnwise,
                                      implementation=name)]  # fmt: skip
    calls += [lambda name, rows=rows: cast_blocks(x, block_rows=rows, dtype=dtype,
              columnwise=columnwise, implementation=name) for rows in (1, 128)]  # fmt: skip
    for call in calls:
        for ours, plain in zip(call("cuda"), call("torch"), strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None and ours.dtype == dtype:
                same_bytes(ours, plain)
            elif ours is not None:
                assert torch.equal(ours, plain)


@pytest.mark.parametrize(("block_rows", "dtype", "mantissa"), [
    (1, torch.float8_e4m3fn, 3), (128, torch.float8_e5m2, 2)])  # fmt: skip
def test_blocks_give_the_values_back(block_rows: int, dtype: torch.dtype, mantissa: int) -> None:
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(4)) + 0.5
    found = cast_blocks(x, block_rows=block_rows, dtype=dtype)
    scales = found.inverse.repeat_interleave(block_rows, 0).repeat_interleave(128, 1)
    assert ((found.rowwise.float() * scales / x - 1).abs() <= 2.0 ** -(mantissa + 1) + 1e-6).all()


BAD = {
    "mismatched state": (
        lambda s, g: adamw(Shard(s.param, s.exp_avg[1:], s.exp_avg_sq), g, 1, HYPER), ShapeError),
    "half master weights": (
        lambda s, g: adamw(Shard(s.param.half(), *s[1:]), g, 1, HYPER), DtypeError),
    "non-contiguous shard": (
        lambda s, g: adamw(Shard(torch.ones(16)[::2], *s[1:]), g, 1, HYPER), ShapeError),
    "fp16 gradient": (lambda s, g: adamw(s, g.half(), 1, HYPER), DtypeError),
    "fp32 weight": (lambda s, g: adamw(s, g, 1, HYPER, weight=g), DtypeError),
    "step 0": (lambda s, g: adamw(s, g, 0, HYPER), ShapeError),
    "int32 step": (lambda s, g: adamw(s, g, torch.ones((), dtype=torch.int32), HYPER), DtypeError),
    "no gradients": (lambda s, g: square_sum([]), ShapeError),
    "mixed gradients": (lambda s, g: square_sum([g, g.bfloat16()]), DtypeError),
    "no room": (lambda s, g: clip_factor(torch.ones(()), 0.0), ShapeError),
    "flat matrix": (lambda s, g: cast_blocks(g), ShapeError),
    "block of 64": (lambda s, g: cast_blocks(torch.ones(2, 2), block_rows=64), ShapeError),
    "int8 result": (
        lambda s, g: cast_tensor(torch.ones(2, 2), torch.ones(()), dtype=torch.int8), DtypeError),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error = BAD[name]
    shard = _shard(8)
    before = shard.param.clone()
    with pytest.raises(error, match="expected") as raised:
        call(shard, torch.ones(8))
    assert isinstance(raised.value, KernelError) and "\n" not in str(raised.value)
    assert torch.equal(shard.param, before)
