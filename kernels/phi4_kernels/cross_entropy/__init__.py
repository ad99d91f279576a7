"""Cross-entropy over a vocabulary that may be split across tensor ranks, gradient in place.

On logits, or on hidden states with the output projection, whose logits then exist in chunks only.
"""

from phi4_kernels.cross_entropy.chunks import LinearLayout
from phi4_kernels.cross_entropy.linear import (
    LossSum,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)
from phi4_kernels.cross_entropy.op import CrossEntropy, cross_entropy
from phi4_kernels.cross_entropy.options import LossOptions

__all__ = [
    "CrossEntropy",
    "LinearLayout",
    "LossOptions",
    "LossSum",
    "cross_entropy",
    "linear_cross_entropy",
    "summed_linear_cross_entropy",
]
