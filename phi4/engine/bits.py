"""Exact sums over tensors by their bits, and whether they are finite: no rounding, no tolerance."""

from collections.abc import Iterable

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32}


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """[] int64 that any one changed bit changes; most other changes do, swapped rows included.

    Rows are added up as integers, and weighted by odd numbers, all modulo 2 ** 64: no order of
    addition changes the sum.

    Args:
        tensor: of 2 or 4 bytes per element, at least one.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.sum(dim=-1, dtype=torch.int64).flatten() if bits.dim() > 1 else bits.long()
    return (rows * torch.arange(1, 2 * rows.numel(), 2, device=rows.device)).sum()


def digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """[n] int64: `digest` of each."""
    return torch.stack([digest(tensor) for tensor in tensors])


def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """[n] bool: whether a tensor holds neither a NaN nor an infinity; reads each once."""
    bounds = [torch.stack(tensor.detach().aminmax()).float() for tensor in tensors]
    return torch.stack(bounds).isfinite().all(dim=1)
