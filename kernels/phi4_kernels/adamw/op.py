"""AdamW over flat fp32 shards, in place: one pass over each gradient, however many shards.

The gradient is read once: unscaling and clipping are a factor that the update multiplies it with,
and the bf16 or FP8 weight is written from registers. What changes from step to step may lie in
device memory, so that a captured CUDA graph can be replayed with another learning rate and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels import native
from phi4_kernels.adamw import torch_impl
from phi4_kernels.checks import expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import ShapeError

_GRAD_DTYPES = (torch.float32, torch.bfloat16)


class FP8Weight(NamedTuple):
    """An e4m3 weight with a delayed scale: chosen before the step, from earlier steps' amax."""

    data: Tensor
    """[n], float8_e4m3fn, written."""
    scale: Tensor
    """[], fp32: multiplies the parameters. A scale per block is refused, see _check_fp8."""
    amax: Tensor
    """[], fp32: raised to max |param|, never lowered; zero it before the step."""


class Shard(NamedTuple):
    """A parameter shard with its gradient; flat, contiguous."""

    param: Tensor
    """[n], fp32, updated: the master weights."""
    exp_avg: Tensor
    """[n], fp32, updated."""
    exp_avg_sq: Tensor
    """[n], fp32, updated."""
    grad: Tensor
    """[n], fp32 or bf16."""
    weight: Tensor | None = None
    """[n], bf16: written with the new parameters, rounded to nearest even."""
    fp8: FP8Weight | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """Constants of the update."""

    lr: float | Tensor
    """A [] fp64 tensor on the shards' device is read when the kernel runs."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled: lr * weight_decay of the old parameter is taken off."""


def adamw(
    shards: Sequence[Shard],
    step: int | Tensor,
    hyper: Hyper,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    implementation: str = "auto",
) -> None:
    """Update shards in place.

    Args:
        shards: gradients of one dtype; all with or all without weight, and fp8. None, or empty
            ones, are nothing to do.
        step: number of this update, from 1; or a [] int64 tensor on the shards' device.
        hyper: learning rate, betas, epsilon, weight decay.
        grad_scale: [], fp32, multiplies the gradients: the clip factor, the inverse loss scale, or
            their product.
        found_inf: [], fp32; where it is not 0 nothing is written. Read when the kernel runs.
        implementation: see native.choose.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors. Nothing is written.
    """
    if not shards:
        return
    scalars = _scalars(step, hyper, grad_scale, found_inf)
    _check(shards, step, scalars)
    if native.resolve("adamw", implementation, shards[0].param.device) == "torch":
        torch_impl.adamw(shards, step, hyper, grad_scale, found_inf)
    else:
        _launch(shards, step, hyper, scalars)


def _scalars(
    step: int | Tensor, hyper: Hyper, grad_scale: Tensor | None, found_inf: Tensor | None
) -> dict[str, tuple[Tensor | None, torch.dtype]]:
    """What may lie in device memory, in the order of the operator's arguments."""
    return {
        "grad_scale": (grad_scale, torch.float32),
        "found_inf": (found_inf, torch.float32),
        "lr": (hyper.lr if isinstance(hyper.lr, Tensor) else None, torch.float64),
        "step": (step if isinstance(step, Tensor) else None, torch.int64),
    }


def _check(
    shards: Sequence[Shard],
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


def _check_shard(shard: Shard, first: Shard) -> None:
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
    if (shard.weight is None, shard.fp8 is None) != (first.weight is None, first.fp8 is None):
        raise ShapeError(
            "adamw: some shards have a weight or an fp8 weight, others none; expected all alike; "
            "call it once for each kind"
        )


def _check_fp8(shard: Shard) -> None:
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


def _launch(
    shards: Sequence[Shard],
    step: int | Tensor,
    hyper: Hyper,
    scalars: dict[str, tuple[Tensor | None, torch.dtype]],
) -> None:
    fp8 = [shard.fp8 for shard in shards if shard.fp8 is not None]
    _adamw(
        [shard.param for shard in shards],
        [shard.exp_avg for shard in shards],
        [shard.exp_avg_sq for shard in shards],
        [shard.grad for shard in shards],
        [shard.weight for shard in shards if shard.weight is not None],
        [weight.data for weight in fp8],
        [weight.scale for weight in fp8],
        [weight.amax for weight in fp8],
        *(tensor for tensor, _ in scalars.values()),
        0.0 if isinstance(hyper.lr, Tensor) else hyper.lr,
        hyper.beta1,
        hyper.beta2,
        hyper.eps,
        hyper.weight_decay,
        1 if isinstance(step, Tensor) else step,
    )


_adamw = native.register(
    "adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] grads, "
    "Tensor(d!)[] weights, Tensor(e!)[] fp8_weights, Tensor[] fp8_scales, Tensor(f!)[] fp8_amaxes, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? device_lr, Tensor? device_step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    lambda *args: None,
)
