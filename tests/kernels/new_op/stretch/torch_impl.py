"""The stretch on PyTorch's own kernels, with PyTorch's own gradients."""

from torch import Tensor


def stretch(x: Tensor, factor: float) -> Tensor:
    """See op.stretch."""
    return factor * x
