"""RMSNorm on PyTorch's own kernels, with PyTorch's own gradients."""

import torch.nn.functional as F
from torch import Tensor

from phi4_kernels.reference_arithmetic import widened
from phi4_kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See op.rms_norm."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    # An fp32 weight over half precision: computed in fp32, rounded once.
    return F.rms_norm(widened(x), weight.shape, widened(weight), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See op.add_rms_norm."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def forward_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: Tensor, columnwise: bool
) -> tuple[Tensor, ...]:
    """See op.rms_norm_fp8."""
    rowwise, amax, total, rstd = reference.rms_norm_fp8(x, weight, eps, scale, residual=residual)
    return rowwise, rowwise.t().contiguous() if columnwise else rowwise, amax, total, rstd


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """See op.rms_norm_backward."""
    return reference.rms_norm_backward(dy, x, weight, rstd, dtotal)
