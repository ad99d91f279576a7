"""The sum of squares by torch's norms of many tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Accumulates in fp64 without copies in fp64 on a CUDA device."""
    # _foreach_norm refuses tensors without elements.
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not filled:
        return tensors[0].new_zeros((), dtype=torch.float64)
    # The norms are squared again: sums of squares add over ranks, norms do not.
    return torch.stack(torch._foreach_norm(filled, 2, torch.float64)).square().sum()
