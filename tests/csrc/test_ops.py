"""The public ops: torch and cuda give the same, and bad input is named."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from phi4_kernels.adamw import FP8Weight, Hyper, ParameterShard, adamw
from phi4_kernels.errors import DtypeError, KernelError, ShapeError
from phi4_kernels.fp8_cast import cast_blocks, cast_tensor
from phi4_kernels.fp8_cast import reference as cast_reference
from phi4_kernels.grad_norm import clip_factor, square_sum

from tests.csrc.host_checks import same_bytes

HYPER = Hyper(lr=1e-2, weight_decay=0.1)
E4M3 = torch.float8_e4m3fn


def _shard(size: int, **changes: object) -> ParameterShard:
    param = torch.randn(size, generator=torch.Generator().manual_seed(2))
    return ParameterShard(param, torch.zeros(size), torch.zeros(size), torch.ones(size))._replace(
        **changes
    )


def _rows_of_one_buffer(size: int) -> ParameterShard:
    """A shard whose parts begin at their own offsets in one storage, as optimizers keep them."""
    rows = torch.rand(4, size, generator=torch.Generator().manual_seed(3))
    return ParameterShard(*rows, weight=torch.zeros(size).bfloat16())


@pytest.mark.parametrize("implementation", ["torch", "cuda"])
def test_adamw_equals_torch_optim(loaded: Path, implementation: str) -> None:
    shards = [_shard(size) for size in (0, 1, 1001)]
    anchors = [torch.nn.Parameter(shard.param.clone()) for shard in shards]
    optimizer = torch.optim.AdamW(anchors, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        for shard, anchor in zip(shards, anchors, strict=True):
            shard.grad.copy_(torch.sin(torch.arange(len(shard.grad)) * step * 1.0))
            anchor.grad = shard.grad * 0.5
        optimizer.step()
        options = {"grad_scale": torch.tensor(0.5), "implementation": implementation}
        adamw(shards, step, HYPER, **options)
    for shard, anchor in zip(shards, anchors, strict=True):
        torch.testing.assert_close(shard.param, anchor.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("size", [0, 1, 1001])
def test_adamw_reads_what_changes_from_tensors(loaded: Path, size: int) -> None:
    grad = torch.cos(torch.arange(size) * 1.0)
    weights = [torch.empty(size, dtype=torch.bfloat16) for _ in range(3)]
    ours, in_memory, plain = (_shard(size, grad=grad.clone(), weight=w) for w in weights)
    device = Hyper(lr=torch.tensor(1e-2, dtype=torch.float64), weight_decay=0.1)
    for step in range(1, 4):
        adamw([ours], step, HYPER, implementation="cuda")
        adamw([in_memory], torch.tensor(step), device, implementation="cuda")
        adamw([plain], torch.tensor(step), device, implementation="torch")
    for one, other, reference in zip(ours[:5], in_memory[:5], plain[:5], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, reference, rtol=2**-8 if one.dtype != torch.float32 else
                                   2e-6, atol=2e-7)  # fmt: skip
    assert torch.equal(ours.weight, ours.param.bfloat16())
    assert torch.equal(plain.weight, plain.param.bfloat16())


@pytest.mark.parametrize("implementation", ["torch", "cuda"])
def test_an_overflow_writes_nothing(loaded: Path, implementation: str) -> None:
    shard = _shard(9, weight=_shard(9).param.bfloat16(), grad=torch.full((9,), torch.nan))
    before = [tensor.clone() for tensor in shard[:5]]
    for found, changed in ((torch.tensor(2.0), False), (torch.tensor(0.0), True)):
        adamw([shard], 1, HYPER, found_inf=found, implementation=implementation)
        same = [torch.equal(a, b) for a, b in zip(shard[:3], before[:3], strict=True)]
        assert same == [not changed] * 3
        assert torch.equal(shard.weight, before[4]) is not changed


@pytest.mark.parametrize("implementation", ["torch", "cuda"])
def test_fp8_weights_carry_the_delayed_scale(loaded: Path, implementation: str) -> None:
    shards = [
        _shard(size, fp8=FP8Weight(torch.empty(size, dtype=torch.float8_e4m3fn),
               torch.tensor(100.0), torch.tensor(start)))
        for size, start in ((0, 0.0), (1001, 0.0), (7, 9.0))
    ]  # fmt: skip
    adamw(shards, 1, HYPER, implementation=implementation)
    for shard in shards:
        expected, amax = cast_reference.cast_tensor(shard.param[None], shard.fp8.scale, E4M3)
        same_bytes(shard.fp8.data, expected[0])
        assert shard.fp8.amax == (9.0 if len(shard.param) == 7 else amax)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_ops_compile_without_a_break(loaded: Path, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles by g++, which is not on PATH")

    def step(shard: ParameterShard, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = square_sum([shard.grad, x], implementation="cuda")
        scale = clip_factor(total, 1.0)
        adamw([shard], 3, HYPER, grad_scale=scale, implementation="cuda")
        cast = cast_blocks(x, columnwise=True, implementation="cuda")
        return shard.param * 2, cast.columnwise.float() + 1

    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(1))
    compiled, plain = (_rows_of_one_buffer(50) for _ in range(2))
    found = torch.compile(step, fullgraph=True, backend=backend)(compiled, x)
    assert all(torch.equal(a, b) for a, b in zip(found, step(plain, x), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled[:5], plain[:5], strict=True))


def test_clipping_is_what_torch_clips() -> None:
    grads = [torch.randn(30), torch.randn(4, 5), torch.empty(0)]
    parameters = [torch.nn.Parameter(g.clone()) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    factor = clip_factor(square_sum(grads), 1.0, eps=1e-6)
    torch.testing.assert_close(parameters[0].grad, grads[0] * factor, rtol=2e-7, atol=0)
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


def _fp8(size: int, scales: tuple[int, ...]) -> FP8Weight:
    data = torch.empty(size, dtype=torch.float8_e4m3fn)
    return FP8Weight(data, torch.ones(scales), torch.zeros(scales))


BAD = {
    "mismatched state": (
        lambda s, g: adamw([s._replace(exp_avg=s.exp_avg[1:])], 1, HYPER), ShapeError),
    "half master weights": (
        lambda s, g: adamw([s._replace(param=s.param.half())], 1, HYPER), DtypeError),
    "matrix": (lambda s, g: adamw([s._replace(param=s.param.view(2, 4))], 1, HYPER), ShapeError),
    "non-contiguous shard": (
        lambda s, g: adamw([s._replace(param=torch.ones(16)[::2])], 1, HYPER), ShapeError),
    "fp16 gradient": (lambda s, g: adamw([s._replace(grad=g.half())], 1, HYPER), DtypeError),
    "gradients of two kinds": (
        lambda s, g: adamw([s, s._replace(grad=g.bfloat16())], 1, HYPER), DtypeError),
    "fp32 weight": (lambda s, g: adamw([s._replace(weight=g)], 1, HYPER), DtypeError),
    "some weights": (
        lambda s, g: adamw([s, s._replace(weight=g.bfloat16())], 1, HYPER), ShapeError),
    "short weight": (
        lambda s, g: adamw([s._replace(weight=g[1:].bfloat16())], 1, HYPER), ShapeError),
    "blockwise fp8": (lambda s, g: adamw([s._replace(fp8=_fp8(8, (2,)))], 1, HYPER), ShapeError),
    "short fp8": (lambda s, g: adamw([s._replace(fp8=_fp8(7, ()))], 1, HYPER), ShapeError),
    "step 0": (lambda s, g: adamw([s], 0, HYPER), ShapeError),
    "int32 step": (lambda s, g: adamw([s], torch.ones((), dtype=torch.int32), HYPER), DtypeError),
    "fp32 rate": (lambda s, g: adamw([s], 1, Hyper(lr=torch.tensor(0.1))), DtypeError),
    "bool overflow": (
        lambda s, g: adamw([s], 1, HYPER, found_inf=torch.tensor(True)), DtypeError),
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
