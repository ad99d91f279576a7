"""PyTorch's own linear cross-entropy in chunks, from 2.13 on."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from phi4_kernels.bench.providers import losses
from phi4_kernels.registry import Entry


def _summed(entry: Entry) -> Callable[..., Any]:
    from torch.nn import LinearCrossEntropyOptions

    def total_of(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
        more = {"reduction": "sum", "ignore_index": ignored}
        chunked = LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, options=chunked, **more)

    return losses.with_gradients(total_of)


FUNCTIONS = {"summed_linear_cross_entropy": _summed}
