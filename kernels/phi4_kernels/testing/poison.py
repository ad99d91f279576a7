"""Buffers between guard bands, filled with NaN, to detect stray accesses and unwritten outputs.

Inside `poisoned()` `torch.empty`, `torch.empty_strided` and `Tensor.new_empty` return such a
buffer. An output element left unwritten stays NaN, a read past an end yields NaN, a write past an
end breaks a band. Inputs are put between bands with `guarded`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from phi4_kernels.errors import GateError

_GUARD_BYTES = 4096
# All bits set: a NaN in every float dtype down to fp8, -1 in every integer.
_POISON = 0xFF


class Guard:
    """The buffers of one run."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def allocate(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: Any
    ) -> Tensor:
        """A poisoned tensor between two bands."""
        # Elements from the first to the last one, gaps between rows included.
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        num_bytes = span * dtype.itemsize
        total = num_bytes + 2 * _GUARD_BYTES
        total += -total % 16
        buffer = _EMPTY(total, dtype=torch.uint8, device=device).fill_(_POISON)
        self._buffers.append((buffer, num_bytes))
        body = buffer[_GUARD_BYTES : _GUARD_BYTES + num_bytes].view(dtype)
        return body.as_strided(size, stride)

    def guarded(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` between two bands, with its strides and poison in its gaps."""
        copy = self.allocate(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        return copy.copy_(tensor.detach())

    def verify(self) -> None:
        """Raise GateError if any band was written to."""
        for buffer, num_bytes in self._buffers:
            # A store of the poison's own bit pattern is not detected; no result has this NaN.
            bands = torch.cat((buffer[:_GUARD_BYTES], buffer[_GUARD_BYTES + num_bytes :]))
            if bool((bands != _POISON).any()):
                raise GateError(
                    f"a kernel wrote outside a buffer of {num_bytes} bytes; expected its guard "
                    "bands untouched; check masks and offsets"
                )


_EMPTY = torch.empty


@contextmanager
def poisoned() -> Iterator[Guard]:
    """Poison and guard all buffers that the functions named in the module docstring allocate."""
    guard = Guard()

    def empty(*size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        # The strides that torch itself would use.
        layout = _EMPTY(shape, device="meta").stride()
        dtype = dtype or torch.get_default_dtype()
        return guard.allocate(tuple(shape), layout, dtype, device or "cpu")

    def empty_strided(size: Any, stride: Any, *, dtype: Any, device: Any = None) -> Tensor:
        return guard.allocate(tuple(size), tuple(stride), dtype, device or "cpu")

    def new_empty(like: Tensor, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return empty(*size, dtype=dtype or like.dtype, device=device or like.device)

    with (
        mock.patch.multiple(torch, empty=empty, empty_strided=empty_strided),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield guard
