"""Random inputs whose rows span six orders of magnitude, with one row of zeros."""

import torch
from torch import Tensor

from phi4_kernels.reference_arithmetic import FP8_MAX, largest

_GAP = 8


def row_scales(num_rows: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """[num_rows], fp64: log-uniform in [low, high]; the second of three or more rows is 0."""
    # low * (high / low)^u, u uniform: as many rows of each order of magnitude
    spread = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    scales = low * (high / low) ** spread
    if num_rows > 2:
        scales[1] = 0.0
    return scales


def rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    low: float = 1e-3,
    high: float = 1e3,
    strided: bool = False,
) -> Tensor:
    """Normal numbers of `shape`, each row (all but the last dim) at its own scale.

    Args:
        shape: at least one dimension.
        dtype: what the numbers are rounded to.
        generator: on the default device.
        low, high: bounds of the scales.
        strided: leave a gap after each row.
    """
    *lead, width = shape
    scales = row_scales(torch.Size(lead).numel(), generator, low, high).view(*lead, 1)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scales
    values = values.to(dtype)
    if not strided:
        return values
    # The gap is NaN, so that reading it shows in the result.
    wide = torch.full((*lead, width + _GAP), torch.nan, dtype=dtype)
    wide[..., :width] = values
    return wide[..., :width]


def gradient_high(dtype: torch.dtype) -> float:
    """Largest scale of incoming gradients: fp16 results must not overflow in the truth itself."""
    return 1.0 if dtype == torch.float16 else 1e3


def saturating_scale(values: Tensor) -> Tensor:
    """[], fp32: an FP8 scale at which the largest of `values` is twice the largest e4m3 number."""
    return 2 * FP8_MAX / largest(values).float() if values.numel() else torch.ones(())
