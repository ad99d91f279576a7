"""Cross-entropy over a vocabulary that may be split across tensor ranks, gradient in place."""

from phi4_kernels.cross_entropy.op import CrossEntropy, cross_entropy
from phi4_kernels.cross_entropy.options import LossOptions

__all__ = ["CrossEntropy", "LossOptions", "cross_entropy"]
