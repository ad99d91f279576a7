"""What every op demands of its arguments, with one wording for all of them."""

from collections.abc import Collection

import torch
from torch import Tensor

from phi4_kernels.errors import DeviceError, DtypeError, ShapeError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expect_dtype(op: str, name: str, tensor: Tensor, allowed: Collection[torch.dtype]) -> None:
    """Raise DtypeError unless `tensor.dtype` is one of `allowed`."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise DtypeError(f"{op}: {name} is {tensor.dtype}; expected {wanted}; cast it before")


def expect_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], remedy: str) -> None:
    """Raise ShapeError unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; expected {shape}; {remedy}"
        )


def expect_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise DeviceError unless all given tensors lie on the device of the first."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    for name in others:
        if present[name].device != present[first].device:
            raise DeviceError(
                f"{op}: {name} is on {present[name].device}; expected {present[first].device}, "
                f"where {first} is; move it there"
            )


def expect_rows(op: str, name: str, tensor: Tensor) -> None:
    """Raise ShapeError unless `tensor` is [..., H]."""
    if tensor.dim() == 0:
        raise ShapeError(f"{op}: {name} is a scalar; expected [..., H]; give it a last dimension")


def rows_of(tensor: Tensor) -> Tensor:
    """`tensor` [..., H] as [T, H] with unit last stride, without a copy where strides allow."""
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.numel() == 0 else rows.contiguous()
