"""FP8 formats, and the scale for a given largest magnitude.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning"; Transformer Engine's rule for
current scaling. Scales are powers of two, so that scaling is exact, and a largest magnitude that
differs because ranks sum in another order changes a scale by one binade or not at all.
"""

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

_EXPONENT_BITS = 0x7F800000


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the factor for values before the cast.

        scale = 2^floor(log2(largest / amax));  1 where amax is 0, infinite or NaN

    Args:
        amax: largest magnitudes, fp32, of any shape.
        dtype: E4M3, whose largest number is 448, or E5M2, 57344.

    Returns:
        fp32 of the same shape.
    """
    info = torch.finfo(torch.float32)
    # A quotient beyond fp32 becomes its largest number.
    scale = (torch.finfo(dtype).max / amax).clamp(max=info.max)
    scale = torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
    # Without the fraction's bits a float is the power of two below it.
    return (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to the nearest even FP8 number; larger values to the largest one. NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)
