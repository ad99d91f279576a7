"""Arguments of an AdamW update: shards with their gradients, and the hyperparameters."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class FP8Weight(NamedTuple):
    """An e4m3 weight with a delayed scale: chosen before the step, from earlier steps' amax."""

    data: Tensor
    """[n], float8_e4m3fn, written."""
    scale: Tensor
    """[], fp32: multiplies the parameters. A scale per block is refused, see op.adamw."""
    amax: Tensor
    """[], fp32: raised to max |param|, never lowered; zero it before the step."""


class ParameterShard(NamedTuple):
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
    """Decoupled: lr * weight_decay of the old parameter is subtracted."""


def device_scalars(
    step: int | Tensor, hyper: Hyper, grad_scale: Tensor | None, found_inf: Tensor | None
) -> dict[str, tuple[Tensor | None, torch.dtype]]:
    """Arguments that may be device tensors, with their dtypes, in the order of csrc's arguments."""
    return {
        "grad_scale": (grad_scale, torch.float32),
        "found_inf": (found_inf, torch.float32),
        "lr": (hyper.lr if isinstance(hyper.lr, Tensor) else None, torch.float64),
        "step": (step if isinstance(step, Tensor) else None, torch.int64),
    }
