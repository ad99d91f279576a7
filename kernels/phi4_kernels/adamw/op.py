"""AdamW over a flat fp32 shard, in place.

The gradient is read once: unscaling and clipping are a factor that the update multiplies it with,
and the bf16 weight is written from registers. What changes from step to step may lie in device
memory, so that a captured CUDA graph can be replayed with another learning rate and step.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels import native
from phi4_kernels.adamw import reference
from phi4_kernels.checks import expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import ShapeError

_GRAD_DTYPES = (torch.float32, torch.bfloat16)


class Shard(NamedTuple):
    """What an optimizer keeps of a parameter shard; fp32, flat, updated in place."""

    param: Tensor
    """[n], the master weights."""
    exp_avg: Tensor
    """[n]."""
    exp_avg_sq: Tensor
    """[n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """Constants of the update."""

    lr: float | Tensor
    """A [] fp64 tensor on the shard's device is read when the kernel runs."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled: lr * weight_decay of the old parameter is taken off."""


def adamw(
    shard: Shard,
    grad: Tensor,
    step: int | Tensor,
    hyper: Hyper,
    *,
    grad_scale: Tensor | None = None,
    weight: Tensor | None = None,
    implementation: str = "auto",
) -> None:
    """Update a shard in place.

    Args:
        shard: the state; contiguous.
        grad: [n], fp32 or bf16.
        step: number of this update, from 1; or a [] int64 tensor on the shard's device.
        hyper: learning rate, betas, epsilon, weight decay.
        grad_scale: [], fp32: the clip factor, the inverse loss scale, or their product.
        weight: [n], bf16: written with the new parameters, rounded to nearest even.
        implementation: see native.choose.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
    """
    _check(shard, grad, step, hyper, grad_scale, weight)
    choice = native.choose("adamw", implementation, shard.param.device)
    if choice.implementation == "torch":
        _run_reference(shard, grad, step, hyper, grad_scale, weight)
    else:
        _launch(shard, grad, step, hyper, grad_scale, weight)


def _check(
    shard: Shard,
    grad: Tensor,
    step: int | Tensor,
    hyper: Hyper,
    grad_scale: Tensor | None,
    weight: Tensor | None,
) -> None:
    device_lr, device_step = _tensor(hyper.lr), _tensor(step)
    flat = {**shard._asdict(), "grad": grad} | ({} if weight is None else {"weight": weight})
    for name, tensor in flat.items():
        expect_shape("adamw", name, tensor, (shard.param.numel(),), "pass a flat shard of one size")
        if not tensor.is_contiguous():
            raise ShapeError(
                f"adamw: {name} has stride {tensor.stride()}; expected a contiguous shard; "
                "an update in place needs the buffer itself, not a copy"
            )
    for name, tensor in shard._asdict().items():
        expect_dtype("adamw", name, tensor, (torch.float32,))
    expect_dtype("adamw", "grad", grad, _GRAD_DTYPES)
    if weight is not None:
        expect_dtype("adamw", "weight", weight, (torch.bfloat16,))
    scalars = {
        "grad_scale": (grad_scale, torch.float32),
        "lr": (device_lr, torch.float64),
        "step": (device_step, torch.int64),
    }
    for name, (tensor, dtype) in scalars.items():
        if tensor is not None:
            expect_shape("adamw", name, tensor, (), "pass a scalar tensor")
            expect_dtype("adamw", name, tensor, (dtype,))
    expect_same_device(
        "adamw", **flat, grad_scale=grad_scale, device_lr=device_lr, device_step=device_step
    )
    if device_step is None and step < 1:
        raise ShapeError(f"adamw: step is {step}; expected at least 1, the number of this update")


def _tensor(value: float | Tensor) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _run_reference(
    shard: Shard,
    grad: Tensor,
    step: int | Tensor,
    hyper: Hyper,
    grad_scale: Tensor | None,
    weight: Tensor | None,
) -> None:
    updated = reference.adamw(*shard, grad, step, **asdict(hyper), grad_scale=grad_scale)
    for old, new in zip(shard, updated, strict=True):
        old.copy_(new)
    if weight is not None:
        weight.copy_(shard.param)


def _launch(
    shard: Shard,
    grad: Tensor,
    step: int | Tensor,
    hyper: Hyper,
    grad_scale: Tensor | None,
    weight: Tensor | None,
) -> None:
    device_lr, device_step = _tensor(hyper.lr), _tensor(step)
    constants = (hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    with native.on_device(shard.param.device) as stream:
        torch.ops.phi4.adamw_(
            *shard,
            grad,
            weight,
            grad_scale,
            device_lr,
            device_step,
            0.0 if device_lr is not None else hyper.lr,
            *constants,
            1 if device_step is not None else step,
            stream,
        )
