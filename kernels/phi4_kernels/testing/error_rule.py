"""The one tolerance of all numeric checks: relative to the error of plain PyTorch.

Truth is the reference on fp64 copies of the rounded inputs, eager is the reference on the inputs as
given. There is no constant to tune, and no way to widen the bound for one kernel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4_kernels.errors import GateError


@dataclass(frozen=True, slots=True)
class Margin:
    """Error of a result as a fraction of the rule's bound; 1.0 is the limit."""

    largest: float
    """Largest error over 2 * eager's + 1 ulp at max |truth|."""
    row: float
    """Worst row's L2 error over 2 * eager's worst relative row error * norm + 1 ulp."""


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at each |magnitude|, subnormals included."""
    info = torch.finfo(dtype)
    # ulp(x) = eps * 2^floor(log2 |x|); below the least normal number the spacing is constant.
    exponent = torch.floor(torch.log2(magnitude.clamp(min=info.smallest_normal)))
    return info.eps * 2.0**exponent


def _as_rows(tensor: Tensor) -> Tensor:
    wide = tensor.detach().cpu().double()
    return wide.reshape(-1, wide.shape[-1]) if wide.dim() else wide.reshape(1, 1)


def check(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> Margin:
    """Check one output or gradient by the rule.

    Args:
        name: for the message.
        ours: the kernel's result.
        eager: the reference's result on the same inputs.
        truth: the reference's result in fp64.

    Raises:
        GateError: wrong shape or dtype, not finite, or over the rule.
    """
    if ours.shape != truth.shape or ours.dtype != eager.dtype:
        raise GateError(
            f"{name}: got {tuple(ours.shape)} {ours.dtype}; expected {tuple(truth.shape)} "
            f"{eager.dtype}, the reference's; fix the kernel's outputs"
        )
    if not ours.numel():
        return Margin(0.0, 0.0)
    values, plain, exact = _as_rows(ours), _as_rows(eager), _as_rows(truth)
    error, eager_error = (values - exact).abs(), (plain - exact).abs()
    # max |ours - truth| <= 2 max |eager - truth| + ulp(max |truth|)
    bound = 2 * eager_error.max() + ulp(exact.abs().max(), ours.dtype)
    norm = exact.norm(dim=1)
    # eager's worst relative row error: max over rows of |eager - truth| / |truth|, in L2
    relative = torch.where(norm > 0, eager_error.norm(dim=1) / norm, 0.0).max()
    # |ours - truth| <= 2 * that * |truth| + ulp(max |truth|), row by row: a large row cannot hide a
    # small one
    row_bound = 2 * relative * norm + ulp(exact.abs().amax(dim=1), ours.dtype)
    row_margins = error.norm(dim=1) / row_bound
    margin = Margin(float(error.max() / bound), float(row_margins.max()))
    # A NaN anywhere makes a maximum NaN, and NaN is not <= 1.
    if not (margin.largest <= 1.0 and margin.row <= 1.0):
        worst = int(row_margins.nan_to_num(nan=math.inf).argmax())
        raise GateError(
            f"{name} ({ours.dtype}): largest error is {margin.largest:.3g} of its bound, row "
            f"{worst}'s is {margin.row:.3g}; expected at most 1 (2x eager's error + 1 ulp); "
            "fix the kernel, the rule has no knob"
        )
    return margin
