"""The definition of the sum of squares over several tensors, accumulated in fp64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of any shape -> [], fp64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
