"""Argument checks shared by all ops, with uniform messages."""

from collections.abc import Collection
from itertools import pairwise

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
    if tensor.shape != shape:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}; {remedy}"
        )


def expect_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise DeviceError unless all given tensors are on the device of the first."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise DeviceError(
                f"{op}: {name} is on {tensor.device}; expected {device}, where {first} is; move it "
                "there"
            )


def expect_rows(op: str, name: str, tensor: Tensor) -> None:
    """Raise ShapeError unless `tensor` is [..., H]."""
    if tensor.dim() == 0:
        raise ShapeError(f"{op}: {name} is a scalar; expected [..., H]; give it a last dimension")


def vector(
    op: str,
    name: str,
    tensor: Tensor,
    length: int,
    allowed: Collection[torch.dtype],
    remedy: str,
) -> Tensor:
    """The 1-D side input `tensor` as kernels index it: contiguous, a copy where it is not.

    Raises:
        DtypeError, ShapeError: it is not of an `allowed` dtype, or not [length].
    """
    expect_dtype(op, name, tensor, allowed)
    expect_shape(op, name, tensor, (length,), remedy)
    return tensor.contiguous()


def expect_rows_in_place(op: str, name: str, tensor: Tensor, row_dims: int) -> None:
    """Raise ShapeError unless `tensor` can be overwritten row by row, seen as [T, row].

    Args:
        op, name: for the message.
        tensor: its last `row_dims` dimensions are a row, the others count rows.
        row_dims: 1 or more.
    """
    if tensor.is_contiguous():
        return
    width, fits = 1, True
    dims = list(zip(tensor.shape, tensor.stride(), strict=True))
    for size, stride in reversed(dims[-row_dims:]):
        # From the last dimension: each stride is the number of elements that the inner ones hold.
        fits &= size == 1 or stride == width
        width *= size
    # Equally spaced rows: each outer dimension spans exactly the inner ones, so that a single
    # stride reaches all rows.
    lead = [dim for dim in dims[:-row_dims] if dim[0] != 1]
    fits &= all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(lead))
    if not fits or (lead and lead[-1][1] < width):
        raise ShapeError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
            "expected contiguous rows at one distance that do not overlap, because they are "
            "overwritten; call .contiguous() before"
        )


def rows_of(tensor: Tensor) -> Tensor:
    """`tensor` [..., H] as [T, H] with unit last stride, without a copy where strides allow."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    # A view where strides allow it; a copy otherwise.
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.numel() == 0 else rows.contiguous()
