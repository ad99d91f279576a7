"""AdamW over flat fp32 shards, in place: one pass over each gradient, however many shards.

The gradient is read once: the update multiplies it by one factor for unscaling and clipping, and
writes the bf16 or FP8 weight from registers. Values that change from step to step may be device
tensors, so that a captured CUDA graph can be replayed with another learning rate and step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.adamw import cuda_impl, torch_impl
from phi4_kernels.adamw.arguments import Hyper, ParameterShard, device_scalars
from phi4_kernels.checks import expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import ShapeError

_GRAD_DTYPES = (torch.float32, torch.bfloat16)


def adamw(
    shards: Sequence[ParameterShard],
    step: int | Tensor,
    hyper: Hyper,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    implementation: str = "auto",
) -> None:
    """Update shards in place.

    Args:
        shards: gradients of one dtype; all with or all without weight, and fp8. The list
            and the shards may be empty.
        step: number of this update, from 1; or a [] int64 tensor on the shards' device.
        hyper: learning rate, betas, epsilon, weight decay.
        grad_scale: [], fp32, multiplies the gradients: the clip factor, the inverse loss scale, or
            their product.
        found_inf: [], fp32; where it is not 0 nothing is written. Read when the kernel runs.
        implementation: see dispatch.choose.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors. Nothing is written.
    """
    if not shards:
        return
    _check(shards, step, device_scalars(step, hyper, grad_scale, found_inf))
    chosen = dispatch.resolve("adamw", implementation, shards[0].param.device)
    # After all checks: either all shards are updated or none is.
    run = cuda_impl.adamw if chosen == "cuda" else torch_impl.adamw
    run(shards, step, hyper, grad_scale, found_inf)


def _check(
    shards: Sequence[ParameterShard],
    step: int | Tensor,
    scalars: dict[str, tuple[Tensor | None, torch.dtype]],
) -> None:
    first = shards[0]
    for shard in shards:
        _check_shard(shard, first)
    for name, (tensor, dtype) in scalars.items():
        if tensor is not None:
            expect_shape("adamw", name, tensor, (), "pass a scalar tensor")
            expect_dtype("adamw", name, tensor, (dtype,))
            expect_same_device("adamw", param=first.param, **{name: tensor})
    if not isinstance(step, Tensor) and step < 1:
        raise ShapeError(f"adamw: step is {step}; expected at least 1, the number of this update")


def _check_shard(shard: ParameterShard, first: ParameterShard) -> None:
    tensors = {"param": shard.param, "exp_avg": shard.exp_avg, "exp_avg_sq": shard.exp_avg_sq}
    for name, tensor in tensors.items():
        expect_dtype("adamw", name, tensor, (torch.float32,))
    expect_dtype("adamw", "grad", shard.grad, _GRAD_DTYPES)
    expect_dtype("adamw", "grad", shard.grad, (first.grad.dtype,))
    tensors["grad"] = shard.grad
    if shard.weight is not None:
        expect_dtype("adamw", "weight", shard.weight, (torch.bfloat16,))
        tensors["weight"] = shard.weight
    if shard.fp8 is not None:
        _check_fp8(shard)
        tensors["fp8"] = shard.fp8.data
    flat = torch.Size((shard.param.numel(),))
    for name, tensor in tensors.items():
        if tensor.shape != flat:
            expect_shape("adamw", name, tensor, tuple(flat), "pass a flat shard of one size")
        if not tensor.is_contiguous():
            raise ShapeError(
                f"adamw: {name} has stride {tensor.stride()}; expected a contiguous shard; "
                "an update in place needs the buffer itself, not a copy"
            )
    expect_same_device("adamw", first=first.param, **tensors)
    # One launch serves all shards, and has one set of outputs.
    if (shard.weight is None, shard.fp8 is None) != (first.weight is None, first.fp8 is None):
        raise ShapeError(
            "adamw: some shards have a weight or an fp8 weight, others none; expected all alike; "
            "call it once for each kind"
        )


def _check_fp8(shard: ParameterShard) -> None:
    assert shard.fp8 is not None
    data, scale, amax = shard.fp8
    expect_dtype("adamw", "fp8", data, (torch.float8_e4m3fn,))
    if scale.dim() or amax.dim():
        raise ShapeError(
            f"adamw: fp8 has a scale of shape {tuple(scale.shape)} and an amax of shape "
            f"{tuple(amax.shape)}; expected one delayed scale, (): a block's scale follows from "
            "its own new weights, which one pass has written before it knows their largest; call "
            "fp8_cast.cast_blocks on the weights after the step"
        )
    for name, tensor in (("scale", scale), ("amax", amax)):
        expect_dtype("adamw", f"fp8 {name}", tensor, (torch.float32,))
    expect_same_device("adamw", param=shard.param, scale=scale, amax=amax)
