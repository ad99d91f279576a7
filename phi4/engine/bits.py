"""Exact integer sums over the bits of tensors, and checks for non-finite values."""

from collections.abc import Iterable

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32}


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return a [] int64 checksum that changes with any single bit, and with most other changes,
    such as swapped rows.

    Rows are added up as integers, and weighted by odd numbers, all modulo 2 ** 64, so the sum does
    not depend on the order of addition.

    Args:
        tensor: tensor of 2 or 4 bytes per element, at least one.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.sum(dim=-1, dtype=torch.int64).flatten() if bits.dim() > 1 else bits.long()
    return (rows * torch.arange(1, 2 * rows.numel(), 2, device=rows.device)).sum()


def digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return [n] int64: `digest` of each tensor."""
    return torch.stack([digest(tensor) for tensor in tensors])


def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return [n] bool: whether a tensor has neither NaN nor infinity; reads each once."""
    bounds = [torch.stack(tensor.detach().aminmax()).float() for tensor in tensors]
    return torch.stack(bounds).isfinite().all(dim=1)
