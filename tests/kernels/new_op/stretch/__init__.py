"""The smallest op that passes every gate: y = factor * x, for test_new_op and for reading."""

from phi4_kernels.stretch.op import stretch

__all__ = ["stretch"]
