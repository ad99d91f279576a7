"""The norm of many gradients at once, bitwise repeatable."""

from phi4_kernels.grad_norm.op import clip_factor, square_sum

__all__ = ["clip_factor", "square_sum"]
